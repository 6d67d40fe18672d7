"""Dense layers with ternary weights.

Shapes: B batch, T positions, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.rms_norm import rms_norm
from smallcoder_jax.ops.ternary import ternary_linear


class BitLinear(nnx.Module):
    """The ternary product of the normed input (BitNet b1.58, arXiv 2402.17764): kernel [in, out], a gain [in]."""

    def __init__(self, inputs: int, outputs: int, *, eps: float, rngs: nnx.Rngs, std: float):
        self.eps = eps
        self.gain = nnx.Param(jnp.ones((inputs,), jnp.float32))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        return ternary_linear(rms_norm(x_BTI, self.gain[...], self.eps), self.kernel[...])
