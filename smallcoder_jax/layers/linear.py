"""A dense layer with float32 parameters and products in the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.ops.linear import linear


class Linear(nnx.Module):
    """y = x kernel (+ bias), with kernel [in, out] initialised from N(0, std^2)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "B T inputs"]) -> Float[Array, "B T outputs"]:
        y = linear(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None, :]
