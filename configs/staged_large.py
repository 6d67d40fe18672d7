"""Staged size large: 1,034,804,800 parameters, 4096 tokens of context.

GELU with biases, RMSNorm, RoPE, tied embeddings.

Command:   python -m smallcoder_jax.main --config=configs/staged_large.py --workdir=runs/staged_large
           or in stages: python -m tools.run_stages --variant=staged_large --no-export
Export:    none: transformers has no such architecture (tools.export says which fields differ).
Hardware:  ask --mode=preflight --topology=...; not tried on any accelerator yet.
Time:      not measured.
Expected:  not measured. The loss starts at ln(32000) = 10.4.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:staged_large")
