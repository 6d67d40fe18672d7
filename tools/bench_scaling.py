"""The former name of `tools.bench.scaling`."""

from tools.old_names import moved

moved(__name__, "tools.bench.scaling")
