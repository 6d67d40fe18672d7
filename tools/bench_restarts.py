"""The former name of `tools.bench.restarts`."""

from tools.old_names import moved

moved(__name__, "tools.bench.restarts")
