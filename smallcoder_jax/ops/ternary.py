"""The product of a ternary layer: weights of -1, 0 and 1, activations of 8 bits, and a straight-through gradient.

Shapes: B batch, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.ops.precision import product

LARGEST = 127.0  # of an activation in 8 bits
SMALLEST = 1e-5  # below which no absolute value is scaled up


@jax.custom_vjp
def ternary_linear(x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x_q kernel_q, in the dtype of `x_BTI` (BitNet b1.58, arXiv 2402.17764, section 2).

    Each token of x is scaled to [-127, 127] by its largest absolute value and rounded; the kernel is scaled by the mean
    of its absolute values, rounded and clipped to [-1, 1]. The integers are multiplied exactly: bfloat16 holds each of
    them, and float32 every sum of up to 2^24 / 127 products. The gradients are those of a product in which rounding is
    the identity (arXiv 1308.3432): dx = dy kernel_q^T and dkernel = x_q^T dy.
    """
    return _forward(x_BTI, kernel_IO)[0]


def quantized_activations(x_BTI: Array) -> tuple[Array, Array]:
    """Whole numbers in [-128, 127] as int8, and what each token's are to be multiplied by, [B, T, 1] in float32."""
    x_float = x_BTI.astype(jnp.float32)
    scale_BT1 = LARGEST / jnp.maximum(jnp.max(jnp.abs(x_float), axis=-1, keepdims=True), SMALLEST)
    whole_BTI = jnp.clip(jnp.round(x_float * scale_BT1), -128.0, LARGEST)
    return whole_BTI.astype(jnp.int8), 1.0 / scale_BT1


def quantized_kernel(kernel_IO: Array) -> tuple[Array, Array]:
    """-1, 0 and 1 as int8, and the scalar that they are to be multiplied by, in float32."""
    scale = 1.0 / jnp.maximum(jnp.mean(jnp.abs(kernel_IO)), SMALLEST)
    return jnp.clip(jnp.round(kernel_IO * scale), -1.0, 1.0).astype(jnp.int8), 1.0 / scale


def quantized_linear(x_BTI: Array, signs_IO: Array, unit: Array) -> Array:
    """`ternary_linear` with a kernel that `quantized_kernel` has quantized."""
    return _scaled_product(*quantized_activations(x_BTI), signs_IO, unit, x_BTI.dtype)


def _scaled_product(whole_BTI: Array, unit_BT1: Array, signs_IO: Array, unit: Array, dtype: DTypeLike) -> Array:
    sums_BTO = product("bti,io->bto", whole_BTI.astype(dtype), signs_IO, jnp.float32)
    return (sums_BTO * (unit_BT1 * unit)).astype(dtype)


def _forward(x_BTI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    whole_BTI, unit_BT1 = quantized_activations(x_BTI)
    # The kernel is quantized again in the backward pass: it is kept anyhow.
    y_BTO = _scaled_product(whole_BTI, unit_BT1, *quantized_kernel(kernel_IO), x_BTI.dtype)
    return y_BTO, (whole_BTI, unit_BT1, kernel_IO)


def _backward(residuals: tuple[Array, Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    whole_BTI, unit_BT1, kernel_IO = residuals
    signs_IO, unit = quantized_kernel(kernel_IO)
    dtype = dy_BTO.dtype
    dx_BTI = unit * product("bto,io->bti", dy_BTO, signs_IO, jnp.float32)
    # The integers stay exact in bfloat16: the scale of a token is applied to the gradient.
    scaled_BTO = (dy_BTO.astype(jnp.float32) * unit_BT1).astype(dtype)
    return dx_BTI.astype(dtype), product("bti,bto->io", whole_BTI.astype(dtype), scaled_BTO, kernel_IO.dtype)


ternary_linear.defvjp(_forward, _backward)


@jax.custom_vjp
def rounded_activations(x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
    """The activations that `ternary_linear` multiplies, with the gradient of the identity."""
    whole_BTI, unit_BT1 = quantized_activations(x_BTI)
    return (whole_BTI.astype(jnp.float32) * unit_BT1).astype(x_BTI.dtype)


@jax.custom_vjp
def rounded_kernel(kernel_IO: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """The kernel that `ternary_linear` multiplies, with the gradient of the identity."""
    signs_IO, unit = quantized_kernel(kernel_IO)
    return signs_IO.astype(kernel_IO.dtype) * unit


rounded_activations.defvjp(lambda x: (rounded_activations(x), None), lambda _, dy: (dy,))
rounded_kernel.defvjp(lambda kernel: (rounded_kernel(kernel), None), lambda _, dy: (dy,))
