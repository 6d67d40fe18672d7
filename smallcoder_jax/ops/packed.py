"""What remains of packed rows in a state of fixed size.

Shapes: B batch, T positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool


def latest(arrays: Any, real_BT: Bool[Array, "B T"], count: int) -> Any:
    """The last `count` real positions of each row, in order, with the last one at the end; zeros where there are fewer.

    `arrays` is a pytree of arrays [B, T, ...]. The real positions need not be next to each other.
    """
    from_end_BT = jnp.cumsum(real_BT[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]  # 1 at the last real position
    places_BT = jnp.where(real_BT & (from_end_BT <= count), count - from_end_BT, count)  # `count`: dropped

    def of_row(x_T: Array, places_T: Array) -> Array:
        return jnp.zeros((count, *x_T.shape[1:]), x_T.dtype).at[places_T].set(x_T, mode="drop")

    return jax.tree.map(lambda x_BT: jax.vmap(of_row)(x_BT, places_BT), arrays)
