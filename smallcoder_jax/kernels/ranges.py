"""Computes on the device, from the segment ids of packed rows, which key blocks each block of queries needs.

Shapes: B batch, T tokens of a row, I blocks of queries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

NOTHING = 2**30  # the start of a query that sees nothing: beyond every key


class Ranges(NamedTuple):
    """The key blocks that each block of queries needs, int32 [B, I] each: it visits the key blocks [first, stop). Every
    query of the block sees all keys of [whole_first, whole_stop), so that these need no mask.
    """

    first_BI: Array
    whole_first_BI: Array
    whole_stop_BI: Array
    stop_BI: Array


def document_starts(segment_ids_BT: Array) -> Array:
    """The index in the row of the first token of each token's document, int32 [B, T]; NOTHING for padding (segment 0).

    Documents are contiguous: two runs of tokens with the same segment id that are not adjacent are two documents.
    """
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    before_BT = jnp.pad(segment_ids_BT, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    first_BT = jnp.where(segment_ids_BT != before_BT, index_T[None, :], 0)
    return jnp.where(segment_ids_BT > 0, jax.lax.cummax(first_BT, axis=1), NOTHING)


def key_ranges(starts_BT: Array, block_q: int, block_kv: int, window: int | None) -> Ranges:
    """Ranges of key blocks for rows whose queries see [max(start, t - window + 1), t]; T divides both block sizes."""
    batch, length = starts_BT.shape
    blocks = length // block_q
    starts_BIq = starts_BT.reshape(batch, blocks, block_q)
    t_Iq = jnp.arange(length, dtype=jnp.int32).reshape(blocks, block_q)
    sees_BIq = starts_BIq < NOTHING
    oldest_BIq = starts_BIq if window is None else jnp.maximum(starts_BIq, t_Iq[None] - window + 1)
    first_BI = jnp.where(sees_BIq, oldest_BIq, NOTHING).min(axis=2) // block_kv
    stop_BI = jnp.where(sees_BIq, t_Iq[None], -1).max(axis=2) // block_kv + 1
    first_BI = jnp.minimum(first_BI, stop_BI)  # an empty range for a block that is all padding
    # Every query sees the keys from the latest start (which for padding is beyond all keys) up to the earliest query.
    latest_BI = oldest_BIq.max(axis=2)
    whole_first_BI = jnp.clip(-(-latest_BI // block_kv), first_BI, stop_BI)
    whole_stop_BI = jnp.clip((t_Iq[None, :, 0] + 1) // block_kv, whole_first_BI, stop_BI)
    return Ranges(*(x.astype(jnp.int32) for x in (first_BI, whole_first_BI, whole_stop_BI, stop_BI)))


def document_stops(segment_ids_BT: Array) -> Array:
    """The index after the last token of each token's document, int32 [B, T]; negative for padding."""
    return segment_ids_BT.shape[1] - document_starts(segment_ids_BT[:, ::-1])[:, ::-1]


def query_ranges(stops_BT: Array, block_kv: int, block_q: int, window: int | None) -> Ranges:
    """Ranges of query blocks for each block of keys, where the queries [s, min(stop, s + window)) see key s. Computed
    as the key ranges of the reversed rows, in which queries and keys exchange their roles.
    """
    length = stops_BT.shape[1]
    backwards = key_ranges(length - stops_BT[:, ::-1], block_kv, block_q, window)
    return Ranges(*(length // block_q - x_BI[:, ::-1] for x_BI in reversed(backwards)))
