"""Settings of the JAX runtime that every command shares."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path


def configure_jax() -> None:
    """Turns on the persistent compilation cache, so that a second start does not compile again. Touches no device.

    The cache is under `$XDG_CACHE_HOME/smallcoder_jax` (by default `~/.cache`); JAX_COMPILATION_CACHE_DIR overrides it.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "smallcoder_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def give_back_memory() -> None:
    """Returns freed host memory to the system. Compiling a step takes some 150 MiB, which glibc would otherwise keep
    for the rest of the run. Does nothing with another C library.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
