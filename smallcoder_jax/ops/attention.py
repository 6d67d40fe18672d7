"""Attention of packed documents: rotation, causality, document borders and grouped heads behind one door.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.errors import UserError
from smallcoder_jax.kernels import flash_tpu
from smallcoder_jax.kernels.tiles import TpuTiles
from smallcoder_jax.mesh import BATCH, HEADS
from smallcoder_jax.ops.precision import matmul_precision
from smallcoder_jax.ops.rope import angles, rotate

IMPLEMENTATIONS = ("xla", "pallas_tpu")
TPU_TILES = TpuTiles(block_q=512, block_kv=512)
# Queries are worked through in blocks, and keys that come after a block are not touched. In long rows a loop over the
# blocks of a span keeps the scores of one block only. (Without a loop, the CPU compiler merges what the backward pass
# recomputes with what the forward pass computed, and keeps all of it.)
QUERY_BLOCK, LOOP_BEYOND, LOOP_SPAN = 128, 1024, 2048


class Choice(NamedTuple):
    implementation: str
    reason: str


def choose(implementation: str, length: int, keys: int, group: int, size: int, platform: str | None = None) -> Choice:
    """Resolves `auto` for rows of `length` queries and `keys` keys, `group` query heads of `size` to a key head.

    `platform` is that of the devices; None when it is compiled for devices that are not here. Raises UserError on an
    unknown name, and where the one asked for cannot serve the shape or the platform.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"attention implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return Choice("xla", "asked for")
    obstacle = (
        f"it serves packed rows, where each query has its key, not {length} queries over {keys} keys"
        if length != keys
        else flash_tpu.obstacle(length, group, size, TPU_TILES)
    )
    if implementation == "pallas_tpu":
        if platform not in (None, "tpu"):
            raise UserError(f"attention implementation 'pallas_tpu' runs on TPUs; the platform is '{platform}'")
        if obstacle:
            raise UserError(f"attention implementation 'pallas_tpu': {obstacle}; use auto or xla")
        return Choice("pallas_tpu", "asked for")
    platform = platform or jax.default_backend()
    if platform != "tpu":
        return Choice("xla", f"the only one for platform '{platform}'")
    return Choice("xla", f"pallas_tpu: {obstacle}") if obstacle else Choice("pallas_tpu", "platform 'tpu', packed rows")


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
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    chosen = choose(implementation, length, keys, q_BTNH.shape[2] // k_BSKH.shape[2], q_BTNH.shape[3])
    if chosen.implementation == "pallas_tpu":
        return _flash_tpu(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, q_segment_ids_BT, rope_theta, window)
    if rope_theta is not None:
        q_BTNH = rotate(q_BTNH, q_positions_BT, rope_theta)
        k_BSKH = rotate(k_BSKH, kv_positions_BS, rope_theta)
    kv = (k_BSKH, v_BSKH, kv_positions_BS, kv_segment_ids_BS)
    queries = (q_BTNH, q_positions_BT, q_segment_ids_BT)
    size, attend = (LOOP_SPAN, _attend_in_loop) if length > LOOP_BEYOND else (QUERY_BLOCK, _attend)
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = stop if keys == length else keys
        outputs.append(attend(tuple(x[:, start:stop] for x in queries), tuple(x[:, :seen] for x in kv), window))
    return jnp.concatenate(outputs, axis=1)


def _flash_tpu(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, segment_ids_BT: Array, theta: float | None,
    window: int | None,
) -> Array:  # fmt: skip
    """The TPU kernel; on a mesh, each device works on its rows and heads."""
    rotation = None if theta is None else angles(positions_BT, q_BTNH.shape[-1], theta)
    attend = functools.partial(flash_tpu.flash_attention, window=window, tiles=TPU_TILES)
    operands = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, rotation)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return attend(*operands)
    in_specs = (HEADS, HEADS, HEADS, BATCH, None if rotation is None else (BATCH, BATCH))
    return jax.shard_map(attend, in_specs=in_specs, out_specs=HEADS, check_vma=False)(*operands)


def _attend_in_loop(queries: tuple[Array, ...], kv: tuple[Array, ...], window: int | None) -> Array:
    """Attention block by block of queries, so that the scores of one block exist at a time."""
    batch, length = queries[0].shape[:2]
    blocks = -(-length // QUERY_BLOCK)

    def in_blocks(x: Array) -> Array:  # [B, T, ...] -> [blocks, B, QUERY_BLOCK, ...], padded with segment 0
        padded = jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    o_XBtNH = jax.lax.map(lambda block: _attend(block, kv, window), tuple(in_blocks(x) for x in queries))
    return jnp.moveaxis(o_XBtNH, 0, 1).reshape(batch, blocks * QUERY_BLOCK, *queries[0].shape[2:])[:, :length]


def visible(
    q_positions_BT: Array, kv_positions_BS: Array, q_segment_ids_BT: Array, kv_segment_ids_BS: Array, window: int | None
) -> Array:
    """Which keys each query sees: bool [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    same_BTS = (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]) & (q_segment_ids_BT[:, :, None] > 0)
    seen_BTS = same_BTS & (distance_BTS >= 0)
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(queries: tuple[Array, ...], kv: tuple[Array, ...], window: int | None) -> Array:
    """Attention of one block. Its backward pass makes the weights again from the log-sum-exp (FlashAttention,
    arXiv 2205.14135, appendix B), so that no scores are kept.
    """
    return _attend_forward(queries, kv, window)[0]


def _attend_forward(queries: tuple[Array, ...], kv: tuple[Array, ...], window: int | None) -> tuple[Array, Any]:
    scores_BKXS, blind_BT = _scores(queries, kv, window)
    v_BSKH = kv[1]
    largest_BKX = scores_BKXS.max(axis=-1, keepdims=True)
    weights_BKXS = jnp.exp(scores_BKXS - largest_BKX)
    sum_BKX = weights_BKXS.sum(axis=-1, keepdims=True)
    o_BKXH = _product("bkxs,bskh->bkxh", weights_BKXS.astype(v_BSKH.dtype), v_BSKH) / sum_BKX
    o_BTNH = _clear(blind_BT, _ungroup(o_BKXH.astype(v_BSKH.dtype), queries[0].shape))
    return o_BTNH, (queries, kv, o_BTNH, largest_BKX + jnp.log(sum_BKX))


def _attend_backward(window: int | None, residuals: Any, do_BTNH: Array) -> tuple[Any, Any]:
    queries, kv, o_BTNH, log_sum_BKX = residuals
    q_BTNH, (k_BSKH, v_BSKH) = queries[0], kv[:2]
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
    d_queries = (dq_BTNH.astype(dtype), None, None)
    return d_queries, (dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(queries: tuple[Array, ...], kv: tuple[Array, ...], window: int | None) -> tuple[Array, Array]:
    """Scaled float32 scores [B, K, G T, S], very low where a query may not look; and which queries see nothing."""
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
    return jnp.einsum(subscripts, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _group(x_BTNH: Array, kv_heads: int) -> Array:
    """[B, T, N, H] to [B, K, G T, H]: the queries of a group stand under one another, for one product per key head."""
    batch, length, heads, size = x_BTNH.shape
    x_BKGTH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    return x_BKGTH.reshape(batch, kv_heads, -1, size)


def _ungroup(x_BKXH: Array, shape: tuple[int, ...]) -> Array:
    batch, length, heads, size = shape
    return x_BKXH.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


def _clear(blind_BT: Array, x_BTNH: Array) -> Array:
    """0 for a query that sees nothing: the arithmetic averages everything for it."""
    return jnp.where(blind_BT[:, :, None, None], jnp.zeros((), x_BTNH.dtype), x_BTNH)
