"""Flash attention over packed rows for TPUs (Pallas Mosaic), with RoPE fused and blocks of other documents skipped.

Forward and backward are those of FlashAttention-2 (arXiv 2307.08691) over the key blocks that `ranges` selects for each
block of queries. Scores are stored transposed, keys by queries, so that whatever belongs to a query (its document's
start, its log-sum-exp) is a row along the lanes, and sums over keys are plain additions. A key head and its values stay
in VMEM while all blocks of queries are processed. The backward pass processes these from last to first. When a block is
done, no remaining block contributes to the gradients of its keys, so that these are rotated back and stored with it.

Shapes: B batch, T tokens (padded to whole tiles), N query heads, K key heads, G = N / K, H head size, I blocks of
queries, R = G block_q queries of a block over a group's heads, S keys of a block.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from smallcoder_jax.kernels.ranges import NOTHING, document_starts, key_ranges
from smallcoder_jax.kernels.tiles import TpuTiles

LOWEST = -1e30  # the score of a key that is not seen
LOG2_E = math.log2(math.e)
LANES = 128
# How much of a core's VMEM (v5e 128 MiB, v5p 64, v6e 128) a kernel may use, by jax's device kind; the rest is for XLA.
VMEM_MIB = {"TPU v5 lite": 120, "TPU v5e": 120, "TPU v5": 60, "TPU v5p": 60, "TPU v6 lite": 120, "TPU v6e": 120}


class Settings(NamedTuple):
    """The static parameters that a kernel is compiled for."""

    tiles: TpuTiles
    group: int
    scale: float  # of the scores: 1 / sqrt(true head size)
    half: int  # half of the true head size, for the rotation; 0: no rotation
    window: int | None
    interpret: bool


def obstacle(
    length: int, group: int, size: int, dtype: DTypeLike, tiles: TpuTiles, device: str | None
) -> str | None:  # fmt: skip
    """Why the kernels cannot serve rows of `length` on a kind of device, or None if they can: a key head with its
    gradients has to fit in VMEM. For no device, and for one that is no TPU (which only interprets a kernel), the
    smallest VMEM counts.
    """
    if device is not None and device.startswith("TPU") and device not in VMEM_MIB:
        return f"it is made for {', '.join(VMEM_MIB)}, not for {device}"
    full_length = -(-length // tiles.row) * tiles.row
    needed = vmem_bytes(full_length, group, size, dtype, tiles, backward=True) >> 20
    limit = VMEM_MIB.get(device or "", min(VMEM_MIB.values()))
    if needed <= limit:
        return None
    return f"rows of {length} tokens need about {needed} MiB of VMEM with {tiles}, more than {limit}"


def vmem_bytes(length: int, group: int, size: int, dtype: DTypeLike, tiles: TpuTiles, *, backward: bool) -> int:
    """The bytes of VMEM that a kernel requests: for its arrays and for what the compiler spills, with a margin. The
    compiler reports for v5e, v5p and v6e spills of 5.2 bytes per score and 16 bytes per element of the block's queries
    at bfloat16, and twice that at float32.
    """
    itemsize, rows, size = jnp.dtype(dtype).itemsize, group * tiles.block_q, -(-size // LANES) * LANES
    keys = 2 * length * size * (itemsize + (4 if backward else 0))  # with the sums of their gradients
    queries = rows * size * itemsize * (9 + 10)  # with outputs and gradients, twice for the pipeline; and spills
    block = 4 * tiles.block_q * size * (itemsize + 4)  # the gradients of keys before they are stored, and the tables
    return keys + queries + block + 3 * itemsize * rows * tiles.block_kv + (2 << 20)


def flash_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_ids_BT: Array,
    rotation: tuple[Array, Array] | None,
    *,
    window: int | None,
    tiles: TpuTiles,
    first_query: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention within documents: [B, T, N, H], differentiable in q, k and v.

    `rotation`: cosine and sine of every position's angles, float32 [B, T, H / 2], or None. Documents are contiguous,
    and segment 0 is padding. Lengths and head sizes are arbitrary: rows are padded to whole tiles, and heads to whole
    registers. `first_query`: the index in the rows of the first query of `q_BTNH`, where it holds only a part of them.
    The blocks of all other queries exist but see no keys, so that no key block is visited for them.
    """
    (batch, own_queries, heads, size), (length, kv_heads) = q_BTNH.shape, k_BTKH.shape[1:3]
    if first_query is not None:
        elsewhere_BTNH = jnp.zeros((batch, length, heads, size), q_BTNH.dtype)
        q_BTNH = jax.lax.dynamic_update_slice_in_dim(elsewhere_BTNH, q_BTNH, first_query, axis=1)
    more_tokens = -length % tiles.row
    more_size = 0 if size in (LANES // 2, LANES) else -size % LANES
    half = size // 2 if rotation else 0
    settings = Settings(tiles, heads // kv_heads, size**-0.5, half, window, interpret)
    full_length, full_size = length + more_tokens, size + more_size

    def by_head(x_BTNH: Array) -> Array:
        padded = jnp.pad(x_BTNH, [(0, 0), (0, more_tokens), (0, 0), (0, more_size)])
        return padded.transpose(0, 2, 1, 3)

    def whole(first_BTh: Array, second_BTh: Array) -> Array:
        table_BTH = jnp.concatenate([first_BTh, second_BTh], axis=-1)
        return jnp.pad(table_BTH, [(0, 0), (0, more_tokens), (0, more_size)])

    tables = (whole(rotation[0], rotation[0]), whole(-rotation[1], rotation[1])) if rotation else ()
    starts_BT = document_starts(jnp.pad(segment_ids_BT, [(0, 0), (0, more_tokens)]))
    if first_query is not None:
        after_first_T = jnp.arange(full_length, dtype=jnp.int32) - first_query
        starts_BT = jnp.where((after_first_T >= 0) & (after_first_T < own_queries), starts_BT, NOTHING)
    q_BKGTH = by_head(q_BTNH).reshape(batch, kv_heads, settings.group, full_length, full_size)
    o_BKGTH: Array = _attend(settings, q_BKGTH, by_head(k_BTKH), by_head(v_BTKH), starts_BT, tables)
    o_BTNH = o_BKGTH.reshape(batch, heads, full_length, full_size)[:, :, :length, :size].transpose(0, 2, 1, 3)
    return o_BTNH if first_query is None else jax.lax.dynamic_slice_in_dim(o_BTNH, first_query, own_queries, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array, starts_BT: Array, tables: tuple[Array, ...]
) -> Array:
    return _forward(settings, q_BKGTH, k_BKTH, v_BKTH, starts_BT, tables)[0]


def _forward(
    settings: Settings, q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array, starts_BT: Array, tables: tuple[Array, ...]
) -> tuple[Array, Any]:
    if tables:  # rotated once, fused with the transposition of k
        cos_B1TH, sin_B1TH = (table[:, None, :, :] for table in tables)
        k_float = k_BKTH.astype(jnp.float32)
        halves = [k_float[..., settings.half : 2 * settings.half], k_float[..., : settings.half]]
        swapped = jnp.concatenate([*halves, k_float[..., 2 * settings.half :]], axis=-1)
        k_BKTH = (k_float * cos_B1TH + swapped * sin_B1TH).astype(k_BKTH.dtype)
    block = _Blocks(settings, q_BKGTH, backward=False)
    (o_BKGTH, log_sum_BKI1R) = pl.pallas_call(
        functools.partial(_forward_kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=block.grid,
            in_specs=[block.starts, block.queries, block.keys, block.keys, *[block.table] * len(tables)],
            out_specs=[block.queries, block.rows],
            scratch_shapes=[
                pltpu.VMEM((block.rows_R, block.size), q_BKGTH.dtype),
                pltpu.VMEM((1, block.rows_R), jnp.float32),
                pltpu.VMEM((1, block.rows_R), jnp.float32),
                pltpu.VMEM((block.size, block.rows_R), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype), block.rows_shape],
        compiler_params=block.compiler_params,
        cost_estimate=block.cost(products=2),
        interpret=settings.interpret,
        name="attention_forward",
    )(block.ranges(starts_BT), block.split(starts_BT), q_BKGTH, k_BKTH, v_BKTH, *tables)
    return o_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, starts_BT, tables, o_BKGTH, log_sum_BKI1R)


def _backward(settings: Settings, residuals: Any, do_BKGTH: Array) -> tuple[Any, ...]:
    q_BKGTH, k_BKTH, v_BKTH, starts_BT, tables, o_BKGTH, log_sum_BKI1R = residuals
    block = _Blocks(settings, q_BKGTH, backward=True)
    inner_BKGT = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH.astype(jnp.float32), axis=-1)
    dq_BKGTH, dk_BKTH, dv_BKTH = pl.pallas_call(
        functools.partial(_backward_kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=block.grid,
            in_specs=[
                block.starts,
                block.queries,
                block.keys,
                block.keys,
                block.queries,
                block.rows,
                block.rows,
                *[block.table] * len(tables),
            ],
            out_specs=[block.queries, block.own_keys, block.own_keys],
            scratch_shapes=[
                pltpu.VMEM((block.rows_R, block.size), q_BKGTH.dtype),
                pltpu.VMEM((block.size, block.rows_R), jnp.float32),
                pltpu.VMEM((block.length, block.size), jnp.float32),
                pltpu.VMEM((block.length, block.size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BKGTH, k_BKTH, v_BKTH)],
        compiler_params=block.compiler_params,
        cost_estimate=block.cost(products=5),
        interpret=settings.interpret,
        name="attention_backward",
    )(
        block.ranges(starts_BT),
        block.split(starts_BT),
        q_BKGTH,
        k_BKTH,
        v_BKTH,
        do_BKGTH,
        log_sum_BKI1R,
        block.by_rows(inner_BKGT),
        *tables,
    )
    return dq_BKGTH, dk_BKTH, dv_BKTH, None, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """How the arrays of one call are split into blocks; the grid is (batch, key head, block of queries)."""

    def __init__(self, settings: Settings, q_BKGTH: Array, *, backward: bool):
        self.settings, dtype = settings, q_BKGTH.dtype
        self.batch, self.kv_heads, self.group, self.length, self.size = q_BKGTH.shape
        self.block_q = settings.tiles.block_q
        self.blocks = self.length // self.block_q
        self.rows_R = self.group * self.block_q
        self.grid = (self.batch, self.kv_heads, self.blocks)
        self.rows_shape = jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.blocks, 1, self.rows_R), jnp.float32)

        def at(i: Any) -> Any:  # the backward pass processes blocks from last to first
            return self.blocks - 1 - i if backward else i

        def spec(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda b, k, i, ranges: index(b, k, at(i)))

        self.starts = spec((1, 1, 1, self.block_q), lambda b, k, i: (b, i, 0, 0))
        self.table = spec((1, self.block_q, self.size), lambda b, k, i: (b, i, 0))
        self.queries = spec((1, 1, self.group, self.block_q, self.size), lambda b, k, i: (b, k, 0, i, 0))
        # A single buffer: the next keys are loaded only after all blocks of queries have been processed.
        self.keys = pl.BlockSpec(
            (1, 1, self.length, self.size), lambda b, k, i, ranges: (b, k, 0, 0), pipeline_mode=pl.Buffered(1)
        )
        self.own_keys = spec((1, 1, self.block_q, self.size), lambda b, k, i: (b, k, i, 0))
        self.rows = spec((1, 1, 1, 1, self.rows_R), lambda b, k, i: (b, k, i, 0, 0))
        self.compiler_params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(self.length, self.group, self.size, dtype, settings.tiles, backward=backward),
        )

    def ranges(self, starts_BT: Array) -> Array:
        """The ranges of key blocks as the kernel's prefetched scalars: int32 [4, B, I]."""
        tiles = self.settings.tiles
        return jnp.stack(key_ranges(starts_BT, tiles.block_q, tiles.block_kv, self.settings.window))

    def split(self, starts_BT: Array) -> Array:
        """[B, T] to [B, I, 1, block_q]."""
        return starts_BT.reshape(self.batch, self.blocks, 1, self.block_q)

    def by_rows(self, x_BKGT: Array) -> Array:
        """[B, K, G, T] to [B, K, I, 1, R]."""
        x_BKGIq = x_BKGT.reshape(self.batch, self.kv_heads, self.group, self.blocks, self.block_q)
        return x_BKGIq.transpose(0, 1, 3, 2, 4).reshape(self.rows_shape.shape)

    def cost(self, products: int) -> pl.CostEstimate:
        """The cost estimate for XLA, for one document per row: which blocks are skipped is known only at run time."""
        pairs = self.batch * self.kv_heads * self.group * self.length * (self.length + 1) // 2
        tokens = self.batch * self.kv_heads * self.length * self.size
        return pl.CostEstimate(
            flops=2 * products * pairs * self.size, transcendentals=pairs,
            bytes_accessed=2 * tokens * (2 + self.group) * products // 2,
        )  # fmt: skip


def _forward_kernel(settings: Settings, ranges: Any, starts: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    *tables, o, log_sum, q_rotated, largest, total, o_sum = rest
    b, i = pl.program_id(0), pl.program_id(2)
    starts_1R, t_1R = _query_rows(settings, starts, i)
    q_rotated[...] = _rotated_queries(settings, q, tables)
    largest[...] = jnp.full_like(largest, LOWEST)
    total[...] = jnp.zeros_like(total)
    o_sum[...] = jnp.zeros_like(o_sum)

    def visit(j: Any, masked: bool) -> None:
        keys = pl.ds(j * settings.tiles.block_kv, settings.tiles.block_kv)
        scores_SR = _scores(settings, k[0, 0, keys, :], q_rotated[...], starts_1R, t_1R, j, masked)
        before_1R = largest[...]
        largest_1R = jnp.maximum(before_1R, jnp.max(scores_SR, axis=0, keepdims=True))
        weights_SR = jnp.exp2(scores_SR - largest_1R)
        fade_1R = jnp.exp2(before_1R - largest_1R)
        largest[...] = largest_1R
        total[...] = fade_1R * total[...] + jnp.sum(weights_SR, axis=0, keepdims=True)
        v_SH = v[0, 0, keys, :]
        o_sum[...] = fade_1R * o_sum[...] + _product(v_SH, weights_SR.astype(v_SH.dtype), ((0,), (0,)))

    _visit_ranges(ranges, b, i, visit)
    blind_1R = starts_1R == NOTHING
    o_HR = jnp.where(blind_1R, 0.0, o_sum[...] / total[...])
    o[0, 0] = o_HR.T.reshape(o.shape[2:]).astype(o.dtype)
    log_sum[0, 0, 0] = jnp.where(blind_1R, -LOWEST, largest[...] + jnp.log2(total[...]))


def _backward_kernel(
    settings: Settings, ranges: Any, starts: Any, q: Any, k: Any, v: Any, do: Any, log_sum: Any, inner: Any, *rest: Any
) -> None:
    *tables, dq, dk, dv, q_rotated, dq_sum, dk_sum, dv_sum = rest
    b, i = pl.program_id(0), pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    starts_1R, t_1R = _query_rows(settings, starts, i)
    q_rotated[...] = _rotated_queries(settings, q, tables)
    dq_sum[...] = jnp.zeros_like(dq_sum)
    do_RH = do[0, 0].reshape(q_rotated.shape)
    log_sum_1R, inner_1R = log_sum[0, 0, 0], inner[0, 0, 0]

    def visit(j: Any, masked: bool) -> None:
        keys = pl.ds(j * settings.tiles.block_kv, settings.tiles.block_kv)
        k_SH, v_SH = k[0, 0, keys, :], v[0, 0, keys, :]
        scores_SR = _scores(settings, k_SH, q_rotated[...], starts_1R, t_1R, j, masked)
        weights_SR = jnp.exp2(scores_SR - log_sum_1R)
        dv_sum[keys, :] += _product(weights_SR.astype(do_RH.dtype), do_RH, ((1,), (0,)))
        d_scores_SR = weights_SR * (_product(v_SH, do_RH, ((1,), (1,))) - inner_1R)
        d_scores_SR = d_scores_SR.astype(k_SH.dtype)
        dk_sum[keys, :] += _product(d_scores_SR, q_rotated[...], ((1,), (0,)))
        dq_sum[...] += _product(k_SH, d_scores_SR, ((0,), (0,)))

    _visit_ranges(ranges, b, i, visit)
    own = pl.ds(i * settings.tiles.block_q, settings.tiles.block_q)
    dq_GqH = (dq_sum[...] * settings.scale).T.reshape(dq.shape[2:])
    # The rotated queries include the factors scale and log2(e), but the gradient needs the scale only.
    dk_qH = dk_sum[own, :] / LOG2_E
    dq[0, 0] = _turn(settings, dq_GqH, tables, back=True).astype(dq.dtype)
    dk[0, 0] = _turn(settings, dk_qH[None], tables, back=True)[0].astype(dk.dtype)
    dv[0, 0] = dv_sum[own, :].astype(dv.dtype)


def _visit_ranges(ranges: Any, b: Any, i: Any, visit: Any) -> None:
    """Calls `visit` for the key blocks of a block of queries, without a mask for the blocks in the middle."""
    first, whole_first, whole_stop, stop = (ranges[n, b, i] for n in range(4))
    for start, end, masked in ((first, whole_first, True), (whole_first, whole_stop, False), (whole_stop, stop, True)):
        jax.lax.fori_loop(start, end, lambda j, _, masked=masked: visit(j, masked), None)


def _query_rows(settings: Settings, starts: Any, i: Any) -> tuple[Array, Array]:
    """For every query of the block, the start of its document and its index in the row, [1, R] each."""
    block_q = settings.tiles.block_q
    t_1q = i * block_q + jax.lax.broadcasted_iota(jnp.int32, (1, block_q), 1)
    starts_1R, t_1R = (jnp.concatenate([x_1q] * settings.group, axis=1) for x_1q in (starts[0, 0], t_1q))
    return starts_1R, t_1R


def _rotated_queries(settings: Settings, q: Any, tables: Any) -> Array:
    """The queries of a block, rotated and multiplied by the scale and log2(e): [R, H]."""
    q_GqH = _turn(settings, q[0, 0].astype(jnp.float32), tables, back=False) * (settings.scale * LOG2_E)
    return q_GqH.reshape(-1, q_GqH.shape[-1]).astype(q.dtype)


def _turn(settings: Settings, x_GqH: Array, tables: Any, *, back: bool) -> Array:
    """RoPE of a float32 array [G, block_q, H] by the block's angles; with `back` the inverse."""
    if not tables:
        return x_GqH
    cos_qH, sin_qH = tables[0][0], tables[1][0]
    x_RH = x_GqH.reshape(-1, x_GqH.shape[-1])
    turned_GqH = _halves_swapped(x_RH, settings.half).reshape(x_GqH.shape)
    return x_GqH * cos_qH[None] + turned_GqH * (-sin_qH if back else sin_qH)[None]


def _halves_swapped(x_RH: Array, half: int) -> Array:
    size = x_RH.shape[1]
    if 2 * half == LANES:
        return pltpu.roll(x_RH, half, axis=1)
    # A head that is narrower than a register, or padded, cannot be rolled; a permutation matrix swaps its halves.
    row_HH = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column_HH = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    partner_HH = jnp.where(column_HH < half, column_HH + half, column_HH - half)
    swap_HH = ((row_HH == partner_HH) & (column_HH < 2 * half)).astype(jnp.float32)
    return _product(x_RH, swap_HH, ((1,), (0,)))


def _scores(settings: Settings, k_SH: Array, q_RH: Array, starts_1R: Array, t_1R: Array, j: Any, masked: bool) -> Array:
    """Scores of key block j in units of log 2, [S, R] float32."""
    scores_SR = _product(k_SH, q_RH, ((1,), (1,)))
    if not masked:
        return scores_SR
    key_S1 = j * k_SH.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (k_SH.shape[0], 1), 0)
    seen_SR = (key_S1 >= starts_1R) & (key_S1 <= t_1R)
    if settings.window is not None:
        seen_SR &= key_S1 > t_1R - settings.window
    return jnp.where(seen_SR, scores_SR, LOWEST)


def _product(a: Array, b: Array, contracting: Any) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32)
