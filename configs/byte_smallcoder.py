"""SmallCoder on bytes: 103,858,688 parameters in full precision; recurrences around 12 blocks of attention on chunks.

Command:   python -m smallcoder_jax.main --config=configs/byte_smallcoder.py --workdir=runs/byte_smallcoder
Hardware:  meant for a GPU or TPUs, not yet tried on one.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5; `boundaries_1` approaches 1 / 6.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/texts.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_smallcoder")
