"""The former name of `tools.bench.attention_jax`."""

from tools.old_names import moved

moved(__name__, "tools.bench.attention_jax")
