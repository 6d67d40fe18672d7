"""The former name of `tools.bench.packed_rows`."""

from tools.old_names import moved

moved(__name__, "tools.bench.packed_rows")
