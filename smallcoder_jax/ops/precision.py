"""The precision of matrix products for each compute dtype."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: no TF32 on GPUs, no bf16 passes on TPUs. bfloat16 takes the hardware's own path."""
    return jax.lax.Precision.HIGHEST if jax.numpy.dtype(dtype) == "float32" else jax.lax.Precision.DEFAULT
