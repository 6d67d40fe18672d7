"""SmallCoder-Medium-LC: 304,137,216 parameters, 8192 tokens of context, trained and evaluated at that length.

Command:   python -m smallcoder_jax.main --config=configs/medium_lc.py --workdir=runs/medium_lc
Hardware:  one NVIDIA H200, on which its step was timed, or TPUs, on which it was not. A CPU takes a few steps.
Time:      on the H200 117,000 tokens/s with one document a row and 157,000 with documents of 2048 tokens, in 15 GiB
           (docs/benchmarks.md); the whole run has not been made.
Faster:    perhaps with --config.compute.layers=unroll --config.compute.remat=none (docs/LOG.md), not measured on a
           GPU; with remat=none alone it was no faster there, in 84 GiB.
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:medium_lc")
