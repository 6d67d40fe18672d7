"""Byte-level, two stages of chunks: 75,068,544 parameters, widths 384, 512 and 768, ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_75m.py --workdir=runs/byte_75m
Hardware:  meant for a GPU or TPUs, not yet tried on one.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5; `boundaries_1` and `boundaries_2` approach 1 / 2.5.

Data is TinyStories; without a network: --config.data.sources=stdlib, or dir:/my/texts.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_75m")
