"""The former name of `tools.bench.data`."""

from tools.old_names import moved

moved(__name__, "tools.bench.data")
