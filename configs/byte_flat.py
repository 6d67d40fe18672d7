"""Byte-level, flat: 20,744,192 parameters, 6 blocks of width 512 with ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_flat.py --workdir=runs/byte_flat
Hardware:  meant for one GPU or TPU, not yet tried on one. A CPU can run a few steps as a trial.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5.

Data is TinyStories; without a network: --config.data.sources=stdlib, or dir:/my/texts.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_flat")
