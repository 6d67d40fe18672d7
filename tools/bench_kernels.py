"""The former name of `tools.bench.kernels`."""

from tools.old_names import moved

moved(__name__, "tools.bench.kernels")
