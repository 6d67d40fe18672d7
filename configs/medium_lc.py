"""SmallCoder-Medium-LC: 304,137,216 parameters, 8192 tokens of context, trained and evaluated at that length.

Command:   python -m smallcoder_jax.main --config=configs/medium_lc.py --workdir=runs/medium_lc
Hardware:  one NVIDIA H200, on which a step was timed, or TPUs, on which none was. A CPU can run a few steps as a trial.
Time:      117,000 tokens/s on the H200 with one document per row, and 157,000 with documents of 2048 tokens, in 15 GiB
           (docs/benchmarks.md). The whole run has not been made.
Faster:    perhaps with --config.compute.layers=unroll --config.compute.remat=none (docs/LOG.md), which is not measured
           on a GPU. With remat=none alone a GPU was no faster, and it used 84 GiB.
Expected:  not measured. The loss starts at ln(32768) = 10.4.

Data is bigcode/the-stack-smol; without a network: --config.data.sources=stdlib, or dir:/my/code.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:medium_lc")
