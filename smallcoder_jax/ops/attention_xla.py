"""Attention in XLA: the reference that the kernels are tested against, and the fallback where no kernel applies.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size, X = G T.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from smallcoder_jax.ops.precision import product

# Queries are processed in blocks, and keys that come after a block are skipped. Rows longer than LOOP_BEYOND are
# processed in spans, with a loop over the blocks of each span, so that only one block's scores exist at a time.
# (Without a loop, the CPU compiler merges the backward pass's recomputation with the forward pass and keeps all
# scores.)
QUERY_BLOCK, LOOP_BEYOND, LOOP_SPAN = 128, 1024, 2048


class Queries(NamedTuple):
    """Rotated queries, their positions in their documents, and the documents' segment ids."""

    q_BTNH: Array
    positions_BT: Array
    segment_ids_BT: Array


class Keys(NamedTuple):
    """Keys, values, their positions in their documents, and the documents' segment ids. Keys passed to `attend_xla` and
    keys in a cache are rotated."""

    k_BSKH: Array
    v_BSKH: Array
    positions_BS: Array
    segment_ids_BS: Array


def attend_xla(queries: Queries, kv: Keys, window: int | None) -> Array:
    """`ops.attention.attention` for queries and keys that are rotated already: [B, T, N, H]."""
    length, keys = queries.q_BTNH.shape[1], kv.k_BSKH.shape[1]
    size, attend = (LOOP_SPAN, _attend_in_loop) if length > LOOP_BEYOND else (QUERY_BLOCK, _attend)
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = stop if keys == length else keys
        block = Queries(*(x[:, start:stop] for x in queries))
        outputs.append(attend(block, Keys(*(x[:, :seen] for x in kv)), window))
    return jnp.concatenate(outputs, axis=1)


def _attend_in_loop(queries: Queries, kv: Keys, window: int | None) -> Array:
    """Attention for one block of queries after the other, so that the scores of only one block exist at a time."""
    batch, length = queries.q_BTNH.shape[:2]
    blocks = -(-length // QUERY_BLOCK)

    def in_blocks(x: Array) -> Array:  # [B, T, ...] -> [blocks, B, QUERY_BLOCK, ...], padded with segment 0
        padded = jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    o_XBtNH = jax.lax.map(lambda block: _attend(block, kv, window), Queries(*(in_blocks(x) for x in queries)))
    return jnp.moveaxis(o_XBtNH, 0, 1).reshape(batch, blocks * QUERY_BLOCK, *queries.q_BTNH.shape[2:])[:, :length]


def visible(
    q_positions_BT: Array, kv_positions_BS: Array, q_segment_ids_BT: Array, kv_segment_ids_BS: Array, window: int | None
) -> Array:
    """Which keys each query sees: bool [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    same_BTS = (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]) & (q_segment_ids_BT[:, :, None] > 0)
    seen_BTS = same_BTS & (distance_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(queries: Queries, kv: Keys, window: int | None) -> Array:
    """Attention for one block. The backward pass recomputes the weights from the log-sum-exp (FlashAttention,
    arXiv 2205.14135, appendix B), so that no scores are kept.
    """
    return _attend_forward(queries, kv, window)[0]


def _attend_forward(queries: Queries, kv: Keys, window: int | None) -> tuple[Array, Any]:
    scores_BKXS, blind_BT = _scores(queries, kv, window)
    v_BSKH = kv.v_BSKH
    largest_BKX = scores_BKXS.max(axis=-1, keepdims=True)
    weights_BKXS = jnp.exp(scores_BKXS - largest_BKX)
    sum_BKX = weights_BKXS.sum(axis=-1, keepdims=True)
    o_BKXH = _product("bkxs,bskh->bkxh", weights_BKXS.astype(v_BSKH.dtype), v_BSKH) / sum_BKX
    o_BTNH = _clear(blind_BT, _ungroup(o_BKXH.astype(v_BSKH.dtype), queries.q_BTNH.shape))
    return o_BTNH, (queries, kv, o_BTNH, largest_BKX + jnp.log(sum_BKX))


def _attend_backward(window: int | None, residuals: Any, do_BTNH: Array) -> tuple[Any, Any]:
    queries, kv, o_BTNH, log_sum_BKX = residuals
    q_BTNH, k_BSKH, v_BSKH = queries.q_BTNH, kv.k_BSKH, kv.v_BSKH
    dtype, kv_heads = q_BTNH.dtype, k_BSKH.shape[2]
    scores_BKXS, blind_BT = _scores(queries, kv, window)
    do_BKXH = _group(_clear(blind_BT, do_BTNH), kv_heads)
    inner_BKX = jnp.sum(
        do_BKXH.astype(jnp.float32) * _group(o_BTNH, kv_heads).astype(jnp.float32), axis=-1, keepdims=True
    )
    weights_BKXS = jnp.exp(scores_BKXS - log_sum_BKX)
    d_scores_BKXS = weights_BKXS * (_product("bkxh,bskh->bkxs", do_BKXH, v_BSKH) - inner_BKX)
    scale = q_BTNH.shape[-1] ** -0.5
    d_scores_BKXS = (d_scores_BKXS * scale).astype(dtype)
    dq_BTNH = _ungroup(_product("bkxs,bskh->bkxh", d_scores_BKXS, k_BSKH), q_BTNH.shape)
    dk_BSKH = _product("bkxs,bkxh->bskh", d_scores_BKXS, _group(q_BTNH, kv_heads))
    dv_BSKH = _product("bkxs,bkxh->bskh", weights_BKXS.astype(dtype), do_BKXH)
    d_queries = queries._replace(q_BTNH=dq_BTNH.astype(dtype), positions_BT=None, segment_ids_BT=None)
    d_kv = kv._replace(
        k_BSKH=dk_BSKH.astype(k_BSKH.dtype), v_BSKH=dv_BSKH.astype(v_BSKH.dtype), positions_BS=None, segment_ids_BS=None
    )
    return d_queries, d_kv


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(queries: Queries, kv: Keys, window: int | None) -> tuple[Array, Array]:
    """Scaled float32 scores [B, K, G T, S], very low where a query does not see the key; and which queries see no
    key."""
    q_BTNH, q_positions_BT, q_segment_ids_BT = queries
    k_BSKH, _, kv_positions_BS, kv_segment_ids_BS = kv
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    scores_BKXS = _product("bkxh,bskh->bkxs", _group(q_BTNH, kv_heads), k_BSKH) * size**-0.5
    seen_BTS = visible(q_positions_BT, kv_positions_BS, q_segment_ids_BT, kv_segment_ids_BS, window)
    scores_BKGTS = scores_BKXS.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None, :, :], scores_BKGTS, jnp.float32(-1e30))
    return scores_BKGTS.reshape(scores_BKXS.shape), ~seen_BTS.any(-1)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return product(subscripts, a, b, jnp.float32)


def _group(x_BTNH: Array, kv_heads: int) -> Array:
    """[B, T, N, H] to [B, K, G T, H]: stacks the queries of a group, so that each key head takes one product."""
    batch, length, heads, size = x_BTNH.shape
    x_BKGTH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    return x_BKGTH.reshape(batch, kv_heads, -1, size)


def _ungroup(x_BKXH: Array, shape: tuple[int, ...]) -> Array:
    batch, length, heads, size = shape
    return x_BKXH.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


def _clear(blind_BT: Array, x_BTNH: Array) -> Array:
    """Sets the output of queries that see no key to 0; softmax would give them the average of all values."""
    return jnp.where(blind_BT[:, :, None, None], jnp.zeros((), x_BTNH.dtype), x_BTNH)
