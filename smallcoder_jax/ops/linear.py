"""The product of a dense layer, with its gradients written out.

Shapes: B batch, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.precision import matmul_precision


@jax.custom_vjp
def linear(x_BTI: Float[Array, "B T I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "B T O"]:
    """x kernel, multiplied in the dtype of `x_BTI`; the gradient of the kernel has the kernel's own dtype.

    Derived by jax, that gradient is (dy^T x)^T, for which a CPU transposes dy at a third of the speed of this product,
    and in bfloat16 it is rounded before it becomes float32.
    """
    return _forward(x_BTI, kernel_IO)[0]


def _forward(x_BTI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    precision = matmul_precision(x_BTI.dtype)
    y_BTO = jnp.einsum("bti,io->bto", x_BTI, kernel_IO.astype(x_BTI.dtype), precision=precision)
    return y_BTO, (x_BTI, kernel_IO)


def _backward(residuals: tuple[Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    x_BTI, kernel_IO = residuals
    precision = matmul_precision(x_BTI.dtype)
    dx_BTI = jnp.einsum("bto,io->bti", dy_BTO, kernel_IO.astype(x_BTI.dtype), precision=precision)
    d_kernel_IO = jnp.einsum("bti,bto->io", x_BTI, dy_BTO, precision=precision, preferred_element_type=kernel_IO.dtype)
    return dx_BTI, d_kernel_IO


linear.defvjp(_forward, _backward)
