"""byte_nano_1stage: 1,087,232 parameters for a laptop CPU; bytes, one stage of chunks, ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_nano_1stage.py --workdir=runs/byte_nano_1stage
Hardware:  two CPU cores.
Time:      five to seven minutes on two cores of a Xeon with AMX, 4.1M bytes.
Expected:  2.14 to 2.16 bits per byte (three seeds) on all held-out files of Python 3.11's standard library, where
           xz -9e needs 2.20 for the files one by one and 1.87 for all in one, and byte_nano 2.12 to 2.13
           (docs/LOG.md). The loss starts at ln(256) = 5.5. `boundaries_1` comes within 5% of 1 / 4.

Data is the standard library of the running Python, as for nano.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_nano_1stage")
