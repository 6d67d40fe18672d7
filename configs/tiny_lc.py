"""SmallCoder-Tiny-LC: 100,682,496 parameters, 8192 tokens of context, trained and evaluated at that length.

Command:   python -m smallcoder_jax.main --config=configs/tiny_lc.py --workdir=runs/tiny_lc
Hardware:  meant for a GPU or TPUs (docs/machines.md), not yet tried on one. A CPU can run a few steps as a trial.
Time:      not measured (docs/benchmarks.md lists what has been).
Faster:    where memory allows, --config.compute.layers=unroll --config.compute.remat=none (docs/LOG.md).
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:tiny_lc")
