"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in Llama.

Shapes: B batch, T positions, N heads, H head size, h pairs of a head or a part of them, P parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def angles(positions_BT: Int[Array, "B T"], size: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of position * theta^(-2i/H) for each pair i of a head of size H = `size`: float32 [B, T, H /
    2]."""
    return _of_frequencies(positions_BT, jnp.asarray(_frequencies(size, theta)))


def _angles_in_loop(positions_BT: Array, size: int, theta: float) -> tuple[Array, Array]:
    """`angles`, computed in a loop over two halves of the pairs. XLA's CPU compiler recomputes the sines in every
    fusion that uses them, once for each head; it fuses nothing across a loop.
    """
    parts = 2 if size % 4 == 0 else 1
    frequency_Ph = jnp.asarray(_frequencies(size, theta)).reshape(parts, -1)
    cos_PBTh, sin_PBTh = jax.lax.map(lambda frequency_h: _of_frequencies(positions_BT, frequency_h), frequency_Ph)
    shape = (*positions_BT.shape, size // 2)
    return jnp.moveaxis(cos_PBTh, 0, 2).reshape(shape), jnp.moveaxis(sin_PBTh, 0, 2).reshape(shape)


def _frequencies(size: int, theta: float) -> np.ndarray:
    # Rounded as in the published Llama code: far from position 0, a difference of one ulp here changes the logits.
    exponent_h = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1.0) / np.power(np.float32(theta), exponent_h)


def _of_frequencies(positions_BT: Array, frequency_h: Array) -> tuple[Array, Array]:
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Turns the pair (x[i], x[i + H/2]) of every head by the angle position * theta^(-2i/H).

    Angles and rotation are float32; the result has the dtype of `x_BTNH`.
    """
    size = x_BTNH.shape[-1]
    tables = jax.lax.platform_dependent(
        positions_BT,
        cpu=lambda positions_BT: _angles_in_loop(positions_BT, size, theta),
        default=lambda positions_BT: angles(positions_BT, size, theta),
    )
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
