"""The key-value cache of incremental decoding.

Shapes: B batch, S cache length, K key-value heads, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from smallcoder_jax.config import ComputeConfig, DecoderConfig

Cache = dict[str, Any]


def init_cache(model: DecoderConfig, compute: ComputeConfig, batch: int, length: int) -> Cache:
    """An empty cache for `length` positions.

    It holds rotated keys and values [B, S, K, H] for each layer. Positions and segment ids [B, S] and the number of
    columns written are shared by all layers. Prompts of unequal lengths are padded on the left with segment 0, so that
    all rows write the same column.
    """
    shape = (batch, length, model.kv_heads, model.head_size)
    dtype = jnp.dtype(compute.dtype)
    return {
        "keys": [jnp.zeros(shape, dtype) for _ in range(model.layers)],
        "values": [jnp.zeros(shape, dtype) for _ in range(model.layers)],
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segment_ids": jnp.zeros((batch, length), jnp.int32),
        "written": jnp.zeros((), jnp.int32),
    }


def write(buffer: jax.Array, new: jax.Array, column: jax.Array) -> jax.Array:
    """`buffer` [B, S, ...] with `new` [B, T, ...] at columns `column` to `column + T`."""
    start = (jnp.zeros((), column.dtype), column, *[jnp.zeros((), column.dtype)] * (buffer.ndim - 2))
    return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), start)
