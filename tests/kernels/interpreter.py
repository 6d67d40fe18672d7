"""Mosaic GPU's interpreter for the tests of the Hopper kernels, each kernel compiled once.

In jax 0.10 the interpreter traces and compiles what a warpgroup does anew for every warpgroup of every block of
threads, because the function that it compiles is made where it is called and no cache knows it again. Newer versions
have it at the top of their module; so it is here.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import jax
import jax.extend
import numpy as np

# Public only in newer versions of jax.
INTERPRET = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()
_LOCK = threading.Lock()


@functools.lru_cache(maxsize=16)
def _compiled(jaxpr: Any, count: int, shapes: tuple[Any, ...]) -> Any:
    """`shapes` of the constants of `jaxpr`, `count` of them, and of its arguments."""

    def run(*values: Any) -> None:
        jax.core.eval_jaxpr(jaxpr, values[:count], *values[count:])

    return jax.jit(run).lower(*shapes).compile()


def _run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
    values = (*consts, *args)
    shapes = tuple(jax.ShapeDtypeStruct(np.shape(value), value.dtype) for value in values)
    with _LOCK:
        compiled = _compiled(jaxpr, len(consts), shapes)
    compiled(*values)


if not hasattr(threads := importlib.import_module("jax._src.pallas.mosaic.interpret.thread_map"), "_run"):
    threads._run_jaxpr = _run_jaxpr
