"""Gradients of flash attention for NVIDIA Hopper: one kernel for queries and one for keys and values.

Two kernels compute the scores twice, which takes seven products instead of five. In return, nothing is summed across
blocks of threads: one warpgroup sums each gradient in registers, in a fixed order, and stores it once, rotated back. (A
single kernel would sum dq in global memory by atomic additions, in an order that changes from run to run.)

Shapes: B batch, T tokens, N query heads, K key heads, G = N / K, H head size, q queries and s keys of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from smallcoder_jax.kernels import hopper
from smallcoder_jax.kernels.hopper import LOG2_E, ROWS, WARPGROUPS, Pipeline, Rows, Saved, Settings


def query_gradients(settings: Settings, saved: Saved, rows: Rows, tables: tuple[Array, ...]) -> Array:
    """dq. Each tile of queries stays in shared memory and iterates over blocks of keys, as in the forward pass."""
    batch, length, heads, size = saved.q_BTNH.shape
    tiles, dtype = settings.tiles, saved.q_BTNH.dtype
    block = jax.ShapeDtypeStruct((tiles.dq_block_kv, size), dtype)
    tile = plgpu.SMEM((WARPGROUPS, ROWS, size), dtype)
    return hopper.kernel(
        functools.partial(_query_kernel, settings),
        settings,
        "attention_dq",
        shape=saved.q_BTNH.shape,
        products=3,
        out_type=jax.ShapeDtypeStruct(saved.q_BTNH.shape, dtype),
        scratch_types=[
            *(tile, tile, plgpu.SMEM((WARPGROUPS, 3, ROWS), jnp.float32), plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32)),
            plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
            *Pipeline.scratch(tiles.dq_stages, block, block),
        ],
        grid=(heads // settings.tile_heads, length // settings.tile_queries, batch),
    )(rows.dq_4BI, rows.oldest_BT, *saved, *tables)


def key_gradients(settings: Settings, saved: Saved, rows: Rows, tables: tuple[Array, ...]) -> tuple[Array, Array]:
    """dk and dv. Each tile of keys stays in shared memory and iterates over the query blocks of all the group's
    heads."""
    batch, length, heads, size = saved.k_BTKH.shape
    block_q, stages, dtype = settings.tiles.dkv_block_q, settings.tiles.dkv_stages, saved.k_BTKH.dtype
    keys, tile = jax.ShapeDtypeStruct(saved.k_BTKH.shape, dtype), plgpu.SMEM((WARPGROUPS, ROWS, size), dtype)
    block = jax.ShapeDtypeStruct((block_q, size), dtype)
    numbers = jax.ShapeDtypeStruct((3, block_q), jnp.float32)
    return hopper.kernel(
        functools.partial(_key_kernel, settings),
        settings,
        "attention_dkv",
        shape=saved.q_BTNH.shape,
        products=4,
        out_type=(keys, keys),
        scratch_types=[
            *(tile, tile, plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32)),
            plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
            *Pipeline.scratch(stages, block, block, numbers),
        ],
        grid=(heads, length // (WARPGROUPS * ROWS), batch),
    )(rows.dkv_4BJ, rows.newest_BT, *saved, *tables)


def _query_kernel(
    settings: Settings, ranges: Any, oldest: Any, q: Any, k: Any, v: Any, do: Any, numbers: Any, *rest: Any
) -> None:
    tables, (dq, *scratch) = hopper.split(settings, rest)
    *tile, loaded = scratch[:5]
    keys = Pipeline(*scratch[5:])
    place = hopper.Place(settings, q.shape)
    first, _, _, stop = bounds = place.bounds(ranges)

    @pl.when(place.warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
        own = (place.batch, place.queries, place.head)
        own_numbers = numbers.at[place.batch, place.head, :, place.queries]
        sources = (q.at[own], do.at[own], own_numbers, oldest.at[own[:2]])
        mine = [x.at[place.warpgroup] for x in tile]
        hopper.fetch(loaded.at[place.warpgroup], *zip(sources, mine, strict=True))
        my_q, my_do, my_numbers, my_oldest = mine
        log_sum_q, inner_q, oldest_q = my_numbers[0], my_numbers[1], my_oldest[...]

        shape = (ROWS, keys.rows)

        def visit(j: Any, dq_qH: Array, masked: bool) -> Array:
            n = j - first
            key_block, value_block = keys.wait(n)
            # The accumulators are initialised with the negated terms that have to be subtracted.
            scores_qs, d_weights_qs = hopper.add_products(
                settings,
                (hopper.along(-log_sum_q, shape, 0), my_q, key_block),
                (hopper.along(-inner_q, shape, 0), my_do, value_block),
            )
            if masked:
                scores_qs = place.mask(scores_qs, oldest_q, j * keys.rows)
            d_scores_qs = (jnp.exp2(scores_qs) * d_weights_qs).astype(my_q.dtype)
            (dq_qH,) = hopper.add_products(settings, (dq_qH, d_scores_qs, key_block))
            keys.release(n)
            return dq_qH

        dq_qH = hopper.visit_ranges(bounds, visit, jnp.zeros(my_q.shape, jnp.float32))
        hopper.store_turned_back(settings, my_q, dq_qH * settings.scale, tables, place.batch, place.queries)
        hopper.store((my_q, dq.at[own]))

    @pl.when(place.warpgroup == WARPGROUPS)
    def _() -> None:
        def load(j: Any) -> None:
            block = (place.batch, pl.ds(j * keys.rows, keys.rows), place.key_head)
            keys.load(j - first, k.at[block], v.at[block])

        hopper.copy_blocks(settings, first, stop, load, keys)


def _key_kernel(
    settings: Settings, ranges: Any, newest: Any, q: Any, k: Any, v: Any, do: Any, numbers: Any, *rest: Any
) -> None:
    tables, (dk, dv, *scratch) = hopper.split(settings, rest)
    tile_k, tile_v, tile_newest, loaded = scratch[:4]
    queries = Pipeline(*scratch[4:])
    key_head, tile, batch, warpgroup = (lax.axis_index(name) for name in ("heads", "tiles", "batch", "warpgroup"))
    group, block_q = settings.group, queries.rows

    # Each block of queries is visited once per head of the group. `n` counts the visits from 0.
    first, *stops = (ranges[n, batch, tile] for n in range(4))
    bounds = (jnp.int32(0), *((stop - first) * group for stop in stops))

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
        first_key = (tile * WARPGROUPS + warpgroup) * ROWS
        own = (batch, pl.ds(first_key, ROWS), key_head)
        my_k, my_v, my_newest = (x.at[warpgroup] for x in (tile_k, tile_v, tile_newest))
        hopper.fetch(loaded.at[warpgroup], (k.at[own], my_k), (v.at[own], my_v), (newest.at[own[:2]], my_newest))
        # The query indices of the columns are loaded with the queries; computed here, they would occupy registers
        # during the whole loop.
        key_s, newest_s = hopper.indices(first_key).astype(jnp.float32), my_newest[...].astype(jnp.float32)

        shape = (ROWS, block_q)

        def visit(n: Any, sums: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
            dk_sH, dv_sH = sums
            q_block, do_block, numbers_block = queries.wait(n)
            # The accumulators are initialised with the negated terms that have to be subtracted. The products are
            # computed one after the other, because registers are scarce.
            (scores_sq,) = hopper.add_products(settings, (hopper.along(-numbers_block[0], shape, 1), my_k, q_block))
            if masked:
                scores_sq = hopper.mask(scores_sq, key_s, newest_s, hopper.along(numbers_block[2], shape, 1))
            weights_sq = jnp.exp2(scores_sq)
            dv_sH, d_weights_sq = hopper.add_products(
                settings,
                (dv_sH, weights_sq.astype(my_k.dtype), do_block),
                (hopper.along(-numbers_block[1], shape, 1), my_v, do_block),
            )
            d_scores_sq = (weights_sq * d_weights_sq).astype(my_k.dtype)
            (dk_sH,) = hopper.add_products(settings, (dk_sH, d_scores_sq, q_block))
            queries.release(n)
            return dk_sH, dv_sH

        nothing_sH = jnp.zeros(my_k.shape, jnp.float32)
        dk_sH, dv_sH = hopper.visit_ranges(bounds, visit, (nothing_sH, nothing_sH))
        my_v[...] = dv_sH.astype(my_v.dtype)
        # The saved queries include the factors scale and log2(e), but the gradient needs the scale only.
        hopper.store_turned_back(settings, my_k, dk_sH / LOG2_E, tables, batch, own[1])
        hopper.store((my_k, dk.at[own]), (my_v, dv.at[own]))

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        def load(n: Any) -> None:
            block = pl.ds((first + lax.div(n, jnp.int32(group))) * block_q, block_q)
            head = key_head * group + lax.rem(n, jnp.int32(group))
            queries.load(n, q.at[batch, block, head], do.at[batch, block, head], numbers.at[batch, head, :, block])

        hopper.copy_blocks(settings, 0, bounds[-1], load, queries)
