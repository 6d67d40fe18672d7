"""byte_nano: 1,120,512 parameters for a laptop CPU; bytes, flat, 4 blocks of width 128 with ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_nano.py --workdir=runs/byte_nano
Hardware:  two CPU cores.
Time:      five to six minutes on two cores of a Xeon with AMX, 3.3M bytes.
Expected:  2.12 to 2.13 bits per byte (three seeds) on all held-out files of Python 3.11's standard library, where
           xz -9e needs 2.20 for the files one by one and 1.87 for all in one, and nano 1.39 to 1.47 (docs/LOG.md).
           The loss starts at ln(256) = 5.5.

Data is the standard library of the running Python, as for nano.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_nano")
