"""Attention of packed documents: rotation, causality, document borders and grouped heads behind one door.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.errors import UserError
from smallcoder_jax.ops.precision import matmul_precision
from smallcoder_jax.ops.rope import rotate

IMPLEMENTATIONS = ("xla",)
# Queries are worked through in blocks, and keys that come after a block are not touched. In long rows a loop over the
# blocks of a span keeps the scores of one block only. (Without a loop, the CPU compiler merges what the backward pass
# recomputes with what the forward pass computed, and keeps all of it.)
QUERY_BLOCK, LOOP_BEYOND, LOOP_SPAN = 256, 1024, 2048


class Choice(NamedTuple):
    implementation: str
    reason: str


def choose(implementation: str) -> Choice:
    """Resolves `auto` once, before compilation; the caller logs the reason. Raises UserError on an unknown name."""
    if implementation == "auto":
        return Choice("xla", f"the implementation that serves platform '{jax.default_backend()}'")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return Choice(implementation, "asked for")


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_positions_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    q_segment_ids_BT: Int[Array, "B T"],
    kv_segment_ids_BS: Int[Array, "B S"],
    rope_theta: float | None,
    window: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(rot(q) rot(k)^T / sqrt(H)) v, where a query sees a key of its own document at or before its position.

    `window`: a query also sees only the last `window` positions, itself included. `rope_theta=None`: no rotation.
    Segment 0 is padding: it sees nothing, nothing sees it, and its output is 0. S == T means that key i belongs to
    query i, as in a packed row, where positions rise within a document. Softmax is float32; the result has the dtype of
    `q_BTNH`.
    """
    choose(implementation)
    if rope_theta is not None:
        q_BTNH = rotate(q_BTNH, q_positions_BT, rope_theta)
        k_BSKH = rotate(k_BSKH, kv_positions_BS, rope_theta)
    kv = (k_BSKH, v_BSKH, kv_positions_BS, kv_segment_ids_BS)
    queries = (q_BTNH, q_positions_BT, q_segment_ids_BT)
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    size, attend = (LOOP_SPAN, _attend_in_loop) if length > LOOP_BEYOND else (QUERY_BLOCK, _attend)
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = stop if keys == length else keys
        outputs.append(attend([x[:, start:stop] for x in queries], [x[:, :seen] for x in kv], window))
    return jnp.concatenate(outputs, axis=1)


def _attend_in_loop(queries: list[Array], kv: list[Array], window: int | None) -> Array:
    """Attention block by block of queries, each block's scores recomputed in the backward pass."""
    batch, length = queries[0].shape[:2]
    blocks = -(-length // QUERY_BLOCK)

    def in_blocks(x: Array) -> Array:  # [B, T, ...] -> [blocks, B, QUERY_BLOCK, ...], padded with segment 0
        padded = jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    attend = jax.checkpoint(lambda block: _attend(block, kv, window))
    o_XBtNH = jax.lax.map(attend, [in_blocks(x) for x in queries])
    return jnp.moveaxis(o_XBtNH, 0, 1).reshape(batch, blocks * QUERY_BLOCK, *queries[0].shape[2:])[:, :length]


def visible(
    q_positions_BT: Array, kv_positions_BS: Array, q_segment_ids_BT: Array, kv_segment_ids_BS: Array, window: int | None
) -> Array:
    """Which keys each query sees: bool [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    same_BTS = (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]) & (q_segment_ids_BT[:, :, None] > 0)
    seen_BTS = same_BTS & (distance_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def _attend(queries: list[Array], kv: list[Array], window: int | None) -> Array:
    q_BTNH, q_positions_BT, q_segment_ids_BT = queries
    k_BSKH, v_BSKH, kv_positions_BS, kv_segment_ids_BS = kv
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    precision = matmul_precision(q_BTNH.dtype)
    q_BTNH = q_BTNH * jnp.asarray(size**-0.5, q_BTNH.dtype)
    # The queries of a group stand under one another: one matrix product for each key-value head.
    q_BKXH = q_BTNH.reshape(batch, length, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q_BKXH = q_BKXH.reshape(batch, kv_heads, group * length, size)
    scores_BKXS = jnp.einsum("bkxh,bskh->bkxs", q_BKXH, k_BSKH, precision=precision, preferred_element_type=jnp.float32)
    seen_BTS = visible(q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, window)
    scores_BKGTS = scores_BKXS.reshape(batch, kv_heads, group, length, -1)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None, :, :], scores_BKGTS, jnp.float32(-1e30))
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    weights_BKXS = weights_BKGTS.reshape(batch, kv_heads, group * length, -1)
    o_BKXH = jnp.einsum("bkxs,bskh->bkxh", weights_BKXS, v_BSKH, precision=precision)
    o_BTNH = o_BKXH.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)
    # A query that sees nothing has averaged everything: its output is defined as 0.
    return jnp.where(seen_BTS.any(-1)[:, :, None, None], o_BTNH, jnp.zeros((), o_BTNH.dtype))
