"""SmallCoder-Small: 195,068,928 parameters, 4096 tokens of context.

Command:   python -m smallcoder_jax.main --config=configs/small.py --workdir=runs/small
Hardware:  meant for a GPU or TPUs (docs/machines.md), not yet tried on one. A CPU can run a few steps as a trial.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:small")
