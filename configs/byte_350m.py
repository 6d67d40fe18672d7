"""Byte-level, published as 350M: 419,383,040 parameters, widths 640, 896 and 1152, doubled recurrences, convolutions.

Command:   python -m smallcoder_jax.main --config=configs/byte_350m.py --workdir=runs/byte_350m
Hardware:  meant for a GPU or TPUs, not yet tried on one.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5; `boundaries_1` and `boundaries_2` approach 1 / 2.5.

Data is TinyStories; without a network: --config.data.sources=stdlib, or dir:/my/texts.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_350m")
