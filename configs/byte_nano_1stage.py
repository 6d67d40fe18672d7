"""byte_nano_1stage: 1,087,232 parameters for a laptop CPU; bytes, one stage of chunks, ternary weights.

Command:   python -m smallcoder_jax.main --config=configs/byte_nano_1stage.py --workdir=runs/byte_nano_1stage
Hardware:  two CPU cores.
Time:      not measured (docs/benchmarks.md lists what has been).
Expected:  not measured. The loss starts at ln(256) = 5.5. `boundaries_1` approaches 1 / 4.

Data is the standard library of the running Python, as for nano.
"""

from smallcoder_jax.configfile import beside

get_config = beside(__file__, "bytes.py:byte_nano_1stage")
