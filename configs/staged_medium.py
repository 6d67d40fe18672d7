"""Staged size medium: 109,612,800 parameters, 1024 tokens of context. GELU with biases, RMSNorm, RoPE, tied embeddings.

Command:   python -m smallcoder_jax.main --config=configs/staged_medium.py --workdir=runs/staged_medium
           or in stages: python -m tools.run_stages --variant=staged_medium --no-export
Export:    none: transformers has no such architecture (tools.export says which fields differ).
Hardware:  ask --mode=preflight --topology=...; not tried on any accelerator yet.
Time:      not measured.
Expected:  not measured. The loss starts at ln(32000) = 10.4.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:staged_medium")
