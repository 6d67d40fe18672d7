"""The former name of `tools.bench.tune_kernels`."""

from tools.old_names import moved

moved(__name__, "tools.bench.tune_kernels")
