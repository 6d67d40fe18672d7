"""The strictest settings for every test: eight fake devices, strict types and ranks, checked shapes."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile more than they compute. A compiled function is small, so dividing it among threads costs more than it
# gains. The older code generator of jaxlib 0.10 takes half the time of the newer one; later versions have only that.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
# A cache for each of pytest-xdist's workers: JAX writes an entry in place, so another process could read half of it.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla" / _worker)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Arrays are arguments of what is compiled: XLA computes with captured ones while it compiles, on one core. (Unrolled
# layers capture the frequencies of their rotation, 256 bytes each.)
os.environ["JAX_CAPTURED_CONSTANTS_WARN_BYTES"] = "10000"


def pytest_configure() -> None:
    from jaxtyping import install_import_hook

    # Shapes in signatures are checked wherever a test passes through them.
    install_import_hook(["smallcoder_jax.ops", "smallcoder_jax.layers", "smallcoder_jax.losses"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first (make test-slow keeps this order), so that no process is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture(autouse=True, scope="module")
def _settled() -> Iterator[None]:
    """A run collects garbage before it trains. What earlier modules have compiled, millions of objects, is not searched
    again each time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """optax mixes types and ranks, which the strict settings refuse: for tests that run an optimizer."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
