"""The former name of `tools.bench.checkpoint`."""

from tools.old_names import moved

moved(__name__, "tools.bench.checkpoint")
