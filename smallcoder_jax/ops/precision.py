"""How matrices are multiplied: in the type of their arrays, or float32 ones by way of bfloat16."""

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
_SETTINGS: Any = jax.config  # whose flags no type checker knows


class Choice(NamedTuple):
    """`exact`: products in the compute dtype. `mixed`: float32 inputs rounded to bfloat16, float32 sums and results."""

    kind: Kind
    reason: str


def choose(compute: ComputeConfig, platform: str) -> Choice:
    """What `compute.matmul` means on a platform: `auto` is mixed for float32 on a CPU with instructions for it, where
    products take about half the time, and exact everywhere else.
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
    """What this machine's first CPU says of itself; nothing where there is no Linux to ask."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def multiplying(kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that the products in it are of that kind, whatever JAX_DEFAULT_MATMUL_PRECISION says.
    Around derivatives, not inside of them: their backward passes are traced last.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        # A setting of jax, because it is part of what jax keeps traced functions by.
        with jax.default_matmul_precision("bfloat16" if kind == "mixed" else None):
            return function(*arguments)

    return traced


def product(subscripts: str, a: Array, b: Array, out: DTypeLike) -> Array:
    """`jnp.einsum` of two arrays in the dtype of `a`, as an array of `out`.

    float32 means float32, without TF32 on GPUs or bfloat16 passes on TPUs, but inside of `multiplying("mixed")`;
    bfloat16 takes the hardware's own path.
    """
    if _is_mixed():
        return _mixed(subscripts, a, b, out)
    if a.dtype != jnp.float32:
        return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=out)
    return jnp.einsum(subscripts, a, b.astype(a.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=out)


def factor(x: Array) -> Array:
    """`x` as products take it: rounded inside of `multiplying("mixed")`. For backward passes, which then keep half."""
    return x.astype(jnp.bfloat16) if _is_mixed() else x


def _is_mixed() -> bool:
    return _SETTINGS.jax_default_matmul_precision == "bfloat16"


def _mixed(subscripts: str, a: Array, b: Array, out: DTypeLike) -> Array:
    """The rounding is written out: XLA's CPU backend does not round by itself, whatever precision it is asked for."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    left, right, result = subscripts.replace("->", ",").split(",")
    if left[-1] in result:
        # Contracted over its last axis the left side has a bfloat16 kernel there; over an earlier one it is multiplied
        # in float32, at a third of the rate. A second contracted axis has the compiler transpose it first.
        a, b, subscripts = a[None], b[None], f"z{left},z{right}->{result}"
    return jnp.einsum(subscripts, a, b, preferred_element_type=out)
