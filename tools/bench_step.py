"""The former name of `tools.bench.step`."""

from tools.old_names import moved

moved(__name__, "tools.bench.step")
