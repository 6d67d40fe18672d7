"""The former name of `tools.bench.benchmarks`."""

from tools.old_names import moved

moved(__name__, "tools.bench.benchmarks")
