"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in Llama.

Shapes: B batch, T positions, N heads, H head size.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def angles(positions_BT: Int[Array, "B T"], size: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of position * theta^(-2i/H) for the pairs i of a head of `size`: float32 [B, T, H / 2] each."""
    # Rounded as the published Llama code rounds it: far from position 0, an ulp here is seen in the logits.
    exponent_h = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency_h = np.float32(1.0) / np.power(np.float32(theta), exponent_h)
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Turns the pair (x[i], x[i + H/2]) of every head by the angle position * theta^(-2i/H).

    Angles and rotation are float32; the result has the dtype of `x_BTNH`.
    """
    cos, sin = (table[:, :, None, :] for table in angles(positions_BT, x_BTNH.shape[-1], theta))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
