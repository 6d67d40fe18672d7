"""The strictest settings for every test: eight fake devices, strict types and ranks, checked shapes."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_configure() -> None:
    from jaxtyping import install_import_hook

    # Shapes in signatures are checked wherever a test passes through them.
    install_import_hook(["smallcoder_jax.ops", "smallcoder_jax.layers", "smallcoder_jax.losses"], "beartype.beartype")
