"""Byte-level, published as 100M: 138,337,472 parameters, widths 576 and 768, doubled recurrences, convolutions.

Command:   python -m smallcoder_jax.main --config=configs/byte_100m.py --workdir=runs/byte_100m
Hardware:  meant for a GPU or TPUs, not yet tried on one.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5; `boundaries_1` approaches 1 / 2.5.

Data is TinyStories; without a network: --config.data.sources=stdlib, or dir:/my/texts.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_100m")
