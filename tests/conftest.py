"""The strictest settings for every test: eight fake devices, strict types and ranks, checked shapes, warnings as errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

# Shapes in signatures are checked wherever a test passes through them.
install_import_hook(["smallcoder_jax.ops", "smallcoder_jax.layers", "smallcoder_jax.losses"], "beartype.beartype")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
