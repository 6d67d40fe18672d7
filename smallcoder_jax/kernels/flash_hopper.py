"""Flash attention over packed rows for NVIDIA Hopper (Pallas Mosaic GPU), with RoPE fused and blocks of other documents
skipped.

The algorithm is FlashAttention-2 (arXiv 2307.08691), organised as in FlashAttention-3 (arXiv 2407.08608): one warpgroup
copies blocks of keys and values by TMA into a pipeline in shared memory, and two others multiply by wgmma. While one of
these computes its softmax, the other uses the tensor cores. The pipeline runs over the key blocks that `ranges` selects
for the tile. Queries are rotated when their tile is loaded, and the kernel also outputs the rotated queries for the
backward pass. Keys are rotated beforehand by XLA in one pass, because every tile of queries loads them again.

Shapes: B batch, T tokens (padded to whole tiles), N query heads, K key heads, G = N / K, H head size (padded to 64 or
128), E = H / 2, I tiles of queries, q queries of a warpgroup, s keys of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from smallcoder_jax.kernels import hopper
from smallcoder_jax.kernels.flash_hopper_backward import key_gradients, query_gradients
from smallcoder_jax.kernels.hopper import LOG2_E, LOWEST, ROWS, WARPGROUPS, Pipeline, Settings
from smallcoder_jax.kernels.ranges import NOTHING, document_starts, document_stops, key_ranges, query_ranges
from smallcoder_jax.kernels.tiles import HopperTiles

SIZES = (64, 128)
HOPPER = ("H100", "H200", "H800", "H20")  # parts of the names of jax's device kinds
LONGEST = 1 << 24
SHARED_MEMORY = 227 << 10  # bytes; the most that a block of threads can use


def obstacle(
    length: int, group: int, size: int, dtype: DTypeLike, tiles: HopperTiles, device: str | None
) -> str | None:  # fmt: skip
    """Why the kernels cannot serve rows of `length` on a kind of device, or None if they can (also for a CPU, which
    interprets them). Any `group` is possible, because each of its heads has its own tiles.
    """
    del group
    if length > LONGEST:
        return f"it counts queries in float32, up to {LONGEST}, not {length}"
    if device not in (None, "cpu") and not any(name in device for name in HOPPER):
        return f"it is made for NVIDIA Hopper (H100, H200), not for {device}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    if size > max(SIZES) or size % 2:
        return f"it serves even head sizes up to {max(SIZES)}, not {size}"
    needed = max(shared_memory_bytes(_full_size(size), tiles).values())
    if needed <= SHARED_MEMORY:
        return None
    return f"{tiles} need {needed >> 10} KiB of shared memory, more than {SHARED_MEMORY >> 10}"


def shared_memory_bytes(size: int, tiles: HopperTiles) -> dict[str, int]:
    """Bytes of shared memory that a block of threads of each kernel needs, for heads padded to `size`."""
    tile, row = 2 * ROWS * size, 4 * ROWS  # bytes of a warpgroup's rows in bfloat16, and of one number per row
    per_key, per_query = 2 * 2 * size, 2 * 2 * size + 3 * 4
    rest = 4 << 10  # barriers, sums across warps, alignment; more than Mosaic GPU requested at any size tried
    return {
        "attention_forward": WARPGROUPS * (tile + 2 * row) + tiles.stages * tiles.block_kv * per_key + rest,
        "attention_dq": WARPGROUPS * (2 * tile + 4 * row) + tiles.dq_stages * tiles.dq_block_kv * per_key + rest,
        "attention_dkv": WARPGROUPS * (2 * tile + row) + tiles.dkv_stages * tiles.dkv_block_q * per_query + rest,
    }


def _full_size(size: int) -> int:
    return next(full for full in SIZES if full >= size)


def flash_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_ids_BT: Array,
    rotation: tuple[Array, Array] | None,
    *,
    window: int | None,
    tiles: HopperTiles,
    interpret: Any = None,
) -> Array:
    """Causal attention within documents: [B, T, N, H], differentiable in q, k and v.

    `rotation`: cosine and sine of every position's angles, float32 [B, T, H / 2], or None. Documents are contiguous,
    and segment 0 is padding. Rows may have any length and heads any even size up to 128: rows are padded to whole
    tiles, and heads to 64 or 128. `interpret`: parameters of Mosaic GPU's interpreter, to run without a GPU.
    """
    length, heads, size = q_BTNH.shape[1:]
    settings = Settings(tiles, heads // k_BTKH.shape[2], size**-0.5, rotation is not None, interpret)
    more_tokens, more_size = -length % tiles.row, _full_size(size) - size

    def whole(x_BTNH: Array) -> Array:
        """Pads each half of a head, so that the two elements of a rotated pair are E apart at any size."""
        halves = x_BTNH.reshape(*x_BTNH.shape[:-1], 2, size // 2)
        padded = jnp.pad(halves, [(0, 0), (0, more_tokens), (0, 0), (0, 0), (0, more_size // 2)])
        return padded.reshape(*padded.shape[:-2], size + more_size)

    segment_ids_BT = jnp.pad(segment_ids_BT, [(0, 0), (0, more_tokens)])
    tables = tuple(jnp.pad(x, [(0, 0), (0, more_tokens), (0, more_size // 2)]) for x in rotation or ())
    rows = _rows(settings, segment_ids_BT, window)
    o_BTNH: Array = _attend(settings, whole(q_BTNH), whole(k_BTKH), whole(v_BTKH), rows, tables)
    halves = o_BTNH.reshape(*o_BTNH.shape[:-1], 2, -1)[:, :length, :, :, : size // 2]
    return halves.reshape(q_BTNH.shape)


def _rows(settings: Settings, segment_ids_BT: Array, window: int | None) -> hopper.Rows:
    """Everything that the kernels know about the documents."""
    tiles, queries = settings.tiles, settings.tile_queries
    starts_BT, stops_BT = document_starts(segment_ids_BT), document_stops(segment_ids_BT)
    oldest_BT, newest_BT = starts_BT, stops_BT
    if window is not None:
        index_1T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)[None, :]
        oldest_BT = jnp.maximum(starts_BT, index_1T - window + 1)
        newest_BT = jnp.minimum(stops_BT, index_1T + window)
    return hopper.Rows(
        oldest_BT,
        newest_BT,
        jnp.stack(key_ranges(starts_BT, queries, tiles.block_kv, window)),
        jnp.stack(key_ranges(starts_BT, queries, tiles.dq_block_kv, window)),
        jnp.stack(query_ranges(stops_BT, WARPGROUPS * ROWS, tiles.dkv_block_q, window)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, rows: hopper.Rows, tables: tuple[Array, ...]
) -> Array:
    return _forward(settings, q_BTNH, k_BTKH, v_BTKH, rows, tables)[0]


def _forward(
    settings: Settings, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, rows: hopper.Rows, tables: tuple[Array, ...]
) -> tuple[Array, Any]:
    if tables:
        first_BTKE, second_BTKE = jnp.split(k_BTKH.astype(jnp.float32), 2, axis=-1)
        angle_BT1E = (tables[0][:, :, None, :], tables[1][:, :, None, :])
        turned = hopper.turn(first_BTKE, second_BTKE, angle_BT1E, back=False)
        k_BTKH = jnp.concatenate(turned, axis=-1).astype(k_BTKH.dtype)
    batch, length, heads, size = q_BTNH.shape
    tiles, dtype = settings.tiles, q_BTNH.dtype
    block = jax.ShapeDtypeStruct((tiles.block_kv, size), dtype)
    queries = jax.ShapeDtypeStruct(q_BTNH.shape, dtype)
    o_BTNH, q_BTNH, log_sum_BNT = hopper.kernel(
        functools.partial(_forward_kernel, settings),
        settings,
        "attention_forward",
        shape=q_BTNH.shape,
        products=2,
        out_type=[queries, queries, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, ROWS, size), dtype),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *Pipeline.scratch(tiles.stages, block),
            *Pipeline.scratch(tiles.stages, block),
        ],
        grid=(heads // settings.tile_heads, length // settings.tile_queries, batch),
    )(rows.forward_4BI, rows.oldest_BT, q_BTNH, k_BTKH, v_BTKH, *tables)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, rows, tables, o_BTNH, log_sum_BNT)


def _backward(settings: Settings, residuals: Any, do_BTNH: Array) -> tuple[Any, ...]:
    q_BTNH, k_BTKH, v_BTKH, rows, tables, o_BTNH, log_sum_BNT = residuals
    inner_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1)
    index_BNT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1], dtype=jnp.float32), log_sum_BNT.shape)
    numbers_BN3T = jnp.stack([log_sum_BNT, inner_BTN.transpose(0, 2, 1), index_BNT], axis=2)
    saved = hopper.Saved(q_BTNH, k_BTKH, v_BTKH, do_BTNH, numbers_BN3T)
    dq_BTNH = query_gradients(settings, saved, rows, tables)
    dk_BTKH, dv_BTKH = key_gradients(settings, saved, rows, tables)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(settings: Settings, ranges: Any, oldest: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    tables, (o, q_rotated, log_sum, *scratch) = hopper.split(settings, rest)
    tile_q, tile_oldest, tile_sum, loaded, turn, *pipelines = scratch
    keys, values = Pipeline(*pipelines[:3]), Pipeline(*pipelines[3:])
    place = hopper.Place(settings, q.shape)
    first, _, _, stop = bounds = place.bounds(ranges)

    @pl.when(place.warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
        own = (place.batch, place.queries, place.head)
        my_q, my_oldest, my_sum = (x.at[place.warpgroup] for x in (tile_q, tile_oldest, tile_sum))
        hopper.fetch(loaded.at[place.warpgroup], (q.at[own], my_q), (oldest.at[own[:2]], my_oldest))
        _rotate_queries(settings, my_q, tables, place)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_q, q_rotated.at[own])
        oldest_q = my_oldest[...]
        o_qH, largest_q, total_q = _attend_to_keys(settings, my_q, oldest_q, keys, values, turn, place, bounds)
        my_sum[...] = jnp.where(oldest_q == NOTHING, -LOWEST, largest_q + jnp.log(total_q) * LOG2_E)
        blind_qH = hopper.along(oldest_q, o_qH.shape, 0) == NOTHING
        o_qH = jnp.where(blind_qH, 0.0, o_qH / hopper.along(total_q, o_qH.shape, 0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        my_q[...] = o_qH.astype(o.dtype)
        hopper.store((my_q, o.at[own]), (my_sum, log_sum.at[place.batch, place.head, place.queries]))

    @pl.when(place.warpgroup == WARPGROUPS)
    def _() -> None:
        def load(j: Any) -> None:
            block = (place.batch, pl.ds(j * keys.rows, keys.rows), place.key_head)
            keys.load(j - first, k.at[block])
            values.load(j - first, v.at[block])

        hopper.copy_blocks(settings, first, stop, load, keys, values)


def _rotate_queries(settings: Settings, my_q: Any, tables: tuple[Any, ...], place: hopper.Place) -> None:
    """Rotates a tile of queries in place and multiplies it by the scale and log2(e)."""
    factor, half = settings.scale * LOG2_E, my_q.shape[1] // 2
    if not tables:
        my_q[...] = (my_q[...].astype(jnp.float32) * factor).astype(my_q.dtype)
        return
    angle = hopper.angles(settings, tables, place.batch, place.queries)
    first_qE, second_qE = my_q[:, :half].astype(jnp.float32), my_q[:, half:].astype(jnp.float32)
    first_qE, second_qE = hopper.turn(first_qE, second_qE, angle, back=False)
    my_q[:, :half] = (first_qE * factor).astype(my_q.dtype)
    my_q[:, half:] = (second_qE * factor).astype(my_q.dtype)


def _attend_to_keys(
    settings: Settings, my_q: Any, oldest_q: Array, keys: Pipeline, values: Pipeline, turn: Any, place: hopper.Place,
    bounds: tuple[Any, ...],
) -> tuple[Array, Array, Array]:  # fmt: skip
    """For each query, the sum of weighted values, the largest score and the sum of weights, over all its key blocks."""

    def pass_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def visit(j: Any, sums: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        o_qH, before_q, total_q = sums
        n = j - bounds[0]
        scores_qs = hopper.product(settings, my_q, *keys.wait(n), meanwhile=pass_turn)
        keys.release(n)
        if masked:
            scores_qs = place.mask(scores_qs, oldest_q, j * keys.rows)
        largest_q = jnp.maximum(before_q, scores_qs.max(axis=1))
        weights_qs = jnp.exp2(scores_qs - hopper.along(largest_q, scores_qs.shape, 0))
        fade_q = jnp.exp2(before_q - largest_q)
        o_qH *= hopper.along(fade_q, o_qH.shape, 0)
        total_q = fade_q * total_q + weights_qs.sum(axis=1)
        # Forces the whole softmax to be computed before this warpgroup asks for the tensor cores.
        o_qH, largest_q, total_q, weights_qs = lax.optimization_barrier(
            (o_qH, largest_q, total_q, weights_qs.astype(my_q.dtype))
        )
        plgpu.barrier_arrive(turn)
        (value_block,) = values.wait(n)
        plgpu.barrier_wait(turn)
        (o_qH,) = hopper.add_products(settings, (o_qH, weights_qs, value_block))
        values.release(n)
        return o_qH, largest_q, total_q

    pl.when(place.warpgroup == 1)(pass_turn)
    nothing_q = jnp.zeros((ROWS,), jnp.float32)
    sums = (jnp.zeros(my_q.shape, jnp.float32), jnp.full((ROWS,), LOWEST, jnp.float32), nothing_q)
    sums = hopper.visit_ranges(bounds, visit, sums)
    pl.when(place.warpgroup == 0)(pass_turn)
    return sums
