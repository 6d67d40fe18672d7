"""Dense layers with ternary weights.

Shapes: B batch, T positions, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.ops.rms_norm import rms_norm
from smallcoder_jax.ops.ternary import quantized_kernel, quantized_linear, rounded_kernel, ternary_linear


class BitLinear(nnx.Module):
    """The ternary product of the normed input (BitNet b1.58, arXiv 2402.17764): kernel [in, out], a gain [in].

    For generation, `quantize` replaces both: the kernel by its -1, 0 and 1, and the gain by one that has a further
    entry, what these are to be multiplied by.
    """

    def __init__(self, inputs: int, outputs: int, *, eps: float, rngs: nnx.Rngs, std: float):
        self.eps = eps
        self.gain = nnx.Param(jnp.ones((inputs,), jnp.float32))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        kernel_IO, unit = self._stored()
        if unit is None:
            return ternary_linear(self.normed(x_BTI), kernel_IO)
        return quantized_linear(self.normed(x_BTI), kernel_IO, unit)

    def normed(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """The input as it is before it is rounded."""
        return rms_norm(x_BTI, self.gain[...][: self.kernel[...].shape[0]], self.eps)

    def rounded_kernel(self) -> Float[Array, "I O"]:
        """The kernel that is multiplied, with the gradient of the identity."""
        kernel_IO, unit = self._stored()
        return rounded_kernel(kernel_IO) if unit is None else kernel_IO.astype(jnp.float32) * unit

    def _stored(self) -> tuple[Array, Array | None]:
        kernel_IO, gain = self.kernel[...], self.gain[...]
        return kernel_IO, None if gain.shape[0] == kernel_IO.shape[0] else gain[-1]


def quantize(params: Any, dtype: DTypeLike) -> Any:
    """The parameters of a model with those of each `BitLinear` as generation uses them: otherwise, every step would
    quantize all kernels again. `dtype` is that of activations, in which -1, 0 and 1 are exact."""
    if not isinstance(params, Mapping):
        return params
    if "gain" not in params:
        return {name: quantize(value, dtype) for name, value in params.items()}
    kernel_IO, gain = _quantized(params["kernel"], params["gain"], jnp.dtype(dtype))
    return {**params, "kernel": kernel_IO, "gain": gain}


@functools.partial(jax.jit, static_argnums=2)
def _quantized(kernel_IO: Array, gain_I: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    signs_IO, unit = quantized_kernel(kernel_IO)
    return signs_IO.astype(dtype), jnp.append(gain_I, unit)
