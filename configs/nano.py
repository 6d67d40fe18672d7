"""nano: 1,967,808 parameters for a laptop CPU; what `make quickstart` and `make pipeline` train.

Command:   python -m smallcoder_jax.main --config=configs/nano.py --workdir=runs/nano
Hardware:  two CPU cores.
Time:      four minutes of training on two cores of a Xeon with AMX, 2.5M tokens; less than six from a fresh clone.
Expected:  1.39 to 1.47 bits per byte (four runs) on all held-out files of Python 3.11's standard library, where
           xz -9e needs 2.21 for the files one by one and 1.87 for all in one (docs/benchmarks.md). The loss starts at
           ln(2048) = 7.6.

The model is this small because a larger one gets less far in a few minutes: this one passes the point at which models
begin to copy from their context (docs/LOG.md).
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "smallcoder.py:nano")
