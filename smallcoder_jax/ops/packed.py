"""What remains of packed rows in a state of fixed size.

Shapes: B batch, T positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


def places_of(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Of each row, the positions where `mask` holds, in order, and then the other positions, in order."""
    return jnp.argsort(~mask_BT, axis=1, stable=True).astype(jnp.int32)


def latest(arrays: Any, real_BT: Bool[Array, "B T"], count: int) -> Any:
    """The last `count` real positions of each row, in order, with the last one at the end; zeros where there are fewer.

    `arrays` is a pytree of arrays [B, T, ...]. The real positions need not be next to each other.
    """
    places_BT = jnp.pad(places_of(~real_BT), [(0, 0), (max(count - real_BT.shape[1], 0), 0)])  # real ones at the end
    places_BT = places_BT[:, places_BT.shape[1] - count :]
    found_BT = jnp.arange(count, 0, -1)[None] <= jnp.sum(real_BT, axis=1, dtype=jnp.int32)[:, None]

    def of(x_BT: Array) -> Array:
        further = [(...), *[None] * (x_BT.ndim - 2)]
        taken = jnp.take_along_axis(x_BT, places_BT[tuple(further)], axis=1)
        return jnp.where(found_BT[tuple(further)], taken, jnp.zeros((), x_BT.dtype))

    return jax.tree.map(of, arrays)
