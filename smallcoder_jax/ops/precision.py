"""The precision of matrix products: that of their arrays, or float32 arrays rounded to bfloat16 first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from smallcoder_jax.config import ComputeConfig

CPUINFO = Path("/proc/cpuinfo")
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # flags of processors that multiply bfloat16 in hardware
Kind = Literal["exact", "mixed"]
_SETTINGS: Any = jax.config  # typed Any, because type checkers do not know its flags


class Choice(NamedTuple):
    """`exact`: products in the compute dtype. `mixed`: float32 inputs rounded to bfloat16, float32 sums and results."""

    kind: Kind
    reason: str


def choose(compute: ComputeConfig, platform: str) -> Choice:
    """Resolves `compute.matmul` on a platform. `auto` is `mixed` for float32 on a CPU with bfloat16 instructions, where
    products take about half the time, and `exact` everywhere else.
    """
    if compute.matmul != "auto":
        return Choice(compute.matmul, "asked for")
    if compute.dtype != "float32":
        return Choice("exact", f"dtype {compute.dtype}")
    if platform != "cpu":
        return Choice("exact", f"platform {platform!r}")
    flags = processor_flags()
    found = [flag for flag in FAST_BFLOAT16 if flag in flags]
    if not found:
        return Choice("exact", f"the CPU has none of {', '.join(FAST_BFLOAT16)}")
    return Choice("mixed", f"the CPU has {', '.join(found)}")


def processor_flags() -> frozenset[str]:
    """The flags of this machine's first CPU; empty where the system is not Linux."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def multiplying(kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that its products are of this kind, whatever JAX_DEFAULT_MATMUL_PRECISION says. Apply it
    around a derivative, not inside, because the backward pass is traced after the differentiated function has returned.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        # A jax setting, not one of our own, because jax includes it in the key of its cache of traced functions.
        with jax.default_matmul_precision("bfloat16" if kind == "mixed" else None):
            return function(*arguments)

    return traced


def product(subscripts: str, a: Array, b: Array, out: DTypeLike) -> Array:
    """`jnp.einsum` of two arrays in the dtype of `a`, with a result of dtype `out`.

    Except inside `multiplying("mixed")`, float32 means float32, without TF32 on GPUs or bfloat16 passes on TPUs.
    bfloat16 uses the hardware's default.
    """
    if _is_mixed():
        return _mixed(subscripts, a, b, out)
    if a.dtype != jnp.float32:
        return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=out)
    return jnp.einsum(subscripts, a, b.astype(a.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=out)


def factor(x: Array) -> Array:
    """`x` as `product` uses it: rounded to bfloat16 inside `multiplying("mixed")`. Backward passes keep this version,
    which halves the memory that it takes."""
    return x.astype(jnp.bfloat16) if _is_mixed() else x


def _is_mixed() -> bool:
    return _SETTINGS.jax_default_matmul_precision == "bfloat16"


def _mixed(subscripts: str, a: Array, b: Array, out: DTypeLike) -> Array:
    """`product` with explicit rounding: XLA's CPU backend does not round, whatever precision is requested."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    left, right, result = subscripts.replace("->", ",").split(",")
    if left[-1] in result:
        # XLA's CPU backend has a bfloat16 kernel only for products that contract the last axis of the left side. A
        # product over an earlier axis runs in float32, at a third of the rate. A second contracted axis makes the
        # compiler transpose the left side first. Without the barrier, a result that is transposed afterwards becomes a
        # product with the sides exchanged, which has no kernel at all and stops the program when it runs.
        a, b, subscripts = a[None], b[None], f"z{left},z{right}->{result}"
        return jax.lax.optimization_barrier(jnp.einsum(subscripts, a, b, preferred_element_type=out))
    return jnp.einsum(subscripts, a, b, preferred_element_type=out)
