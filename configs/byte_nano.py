"""byte_nano: 1,120,512 parameters for a laptop CPU; bytes, flat, 4 blocks of width 128 with ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_nano.py --workdir=runs/byte_nano
Hardware:  two CPU cores.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5.

Data is the standard library of the running Python, as for nano.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_nano")
