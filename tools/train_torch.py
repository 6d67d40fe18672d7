"""The former name of `tools.bench.train_torch`."""

from tools.old_names import moved

moved(__name__, "tools.bench.train_torch")
