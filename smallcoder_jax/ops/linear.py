"""The product of a dense layer, with its gradients written out.

Shapes: B batch, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import jax
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.precision import factor, product


@jax.custom_vjp
def linear(x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x kernel, multiplied in the dtype of `x_BTI`; the gradient of the kernel has the kernel's own dtype.

    Derived by jax, that gradient is (dy^T x)^T, for which a CPU transposes dy at a third of the speed of this product,
    and in bfloat16 it is rounded before it becomes float32.
    """
    return _forward(x_BTI, kernel_IO)[0]


def _forward(x_BTI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return product("bti,io->bto", x_BTI, kernel_IO, x_BTI.dtype), (factor(x_BTI), kernel_IO)


def _backward(residuals: tuple[Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    x_BTI, kernel_IO = residuals
    dx_BTI = product("bto,io->bti", dy_BTO, kernel_IO, dy_BTO.dtype)
    return dx_BTI, product("bti,bto->io", x_BTI, dy_BTO, kernel_IO.dtype)


linear.defvjp(_forward, _backward)
