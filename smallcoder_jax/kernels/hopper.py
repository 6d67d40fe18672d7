"""Code that the kernels for NVIDIA Hopper share (Pallas Mosaic GPU): products of warpgroups, and RoPE of a tile.

A block of threads has WARPGROUPS warpgroups that compute and one that copies. Each computing warpgroup owns ROWS rows,
those of one wgmma instruction, and keeps its accumulators in registers.

Shapes: B batch, T tokens, N query heads, K key heads, H head size (a multiple of 64), E = H / 2; r rows of a
warpgroup, s rows of the other side.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from smallcoder_jax.kernels.tiles import HopperTiles

LOWEST = -1e30  # the score of a key that is not seen
LOG2_E = math.log2(math.e)
WARPGROUPS, ROWS = 2, 64
# Registers per thread. A multiprocessor has 65536 for 2 * 128 threads that compute and 128 that copy.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
# In jax 0.10 `load` takes the index as a separate argument, and `kernel` takes no cost estimate.
_LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


class Settings(NamedTuple):
    """The static parameters that the kernels are compiled for."""

    tiles: HopperTiles
    group: int
    scale: float  # of the scores: 1 / sqrt(true head size)
    rotated: bool
    interpret: Any  # the parameters of Mosaic GPU's interpreter, or None

    @property
    def tile_heads(self) -> int:
        """The number of query heads per tile. Where it is 2, the warpgroups of a tile work on two heads of a group;
        otherwise they work on two blocks of queries."""
        return WARPGROUPS if self.group % WARPGROUPS == 0 else 1

    @property
    def tile_queries(self) -> int:
        return ROWS * WARPGROUPS // self.tile_heads


class Rows(NamedTuple):
    """What the kernels know about the documents: the oldest key that each query sees (NOTHING for padding), the end of
    the range of queries that see each key (negative for padding), and the ranges of blocks for each tile.
    """

    oldest_BT: Array
    newest_BT: Array
    forward_4BI: Array
    dq_4BI: Array
    dkv_4BJ: Array


class Saved(NamedTuple):
    """The inputs of the backward pass: queries, rotated and multiplied by the scale and log2(e); rotated keys; values;
    output gradients; and three numbers per query: the log2 of the sum of its weights, the inner product of its output
    and the output's gradient, and its index.
    """

    q_BTNH: Array
    k_BTKH: Array
    v_BTKH: Array
    do_BTNH: Array
    numbers_BN3T: Array


class Place:
    """The position of a warpgroup in the grid of a kernel over tiles of queries. Late tiles, which see the most keys,
    come first in the grid, so that short ones balance the load at the end.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...]):
        heads, tiles = lax.axis_index("heads"), shape[1] // settings.tile_queries
        self.batch, self.warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
        self.tile = tiles - 1 - lax.axis_index("tiles")
        over_heads = settings.tile_heads > 1
        self.head = heads * settings.tile_heads + (self.warpgroup if over_heads else 0)
        self.key_head = lax.div(heads * settings.tile_heads, jnp.int32(settings.group))
        self.first_query = self.tile * settings.tile_queries + (0 if over_heads else self.warpgroup * ROWS)
        self.queries = pl.ds(self.first_query, ROWS)

    def bounds(self, ranges: Any) -> tuple[Any, ...]:
        """The four bounds of the tile's ranges."""
        return tuple(ranges[n, self.batch, self.tile] for n in range(4))

    def mask(self, scores_qs: Array, oldest_q: Array, first_key: Any) -> Array:
        """The scores, set to LOWEST for keys that a query does not see."""
        key_qs = first_key + lax.broadcasted_iota(jnp.int32, scores_qs.shape, 1)
        return mask(scores_qs, oldest_q, indices(self.first_query + 1), key_qs)


class Pipeline:
    """A ring of blocks in shared memory that the copying warpgroup fills and the computing ones consume. Blocks that
    belong together, such as keys and values, share a slot. Block n of a kernel's sequence is in slot n modulo the
    number of stages.
    """

    def __init__(self, *scratch: Any):
        *self.slots, self.full, self.empty = scratch
        self.stages, self.rows = self.slots[0].shape[:2]

    @staticmethod
    def scratch(stages: int, *blocks: jax.ShapeDtypeStruct) -> list[Any]:
        return [
            *(plgpu.SMEM((stages, *block.shape), block.dtype) for block in blocks),
            plgpu.Barrier(num_arrivals=len(blocks), num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ]

    def slot(self, n: Any) -> Any:
        return lax.rem(n, jnp.int32(self.stages))

    def load(self, n: Any, *sources: Any) -> None:
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[self.slot(n)]))
        for source, slots in zip(sources, self.slots, strict=True):
            plgpu.copy_gmem_to_smem(source, slots.at[self.slot(n)], self.full.at[self.slot(n)])

    def wait(self, n: Any) -> list[Any]:
        plgpu.barrier_wait(self.full.at[self.slot(n)])
        return [slots.at[self.slot(n)] for slots in self.slots]

    def release(self, n: Any) -> None:
        plgpu.barrier_arrive(self.empty.at[self.slot(n)])

    def drain(self, settings: Settings, count: Any) -> None:
        """Waits until all of `count` blocks are released, which only the interpreter requires. On the device, where
        waiting would cost registers, it does nothing.
        """
        if settings.interpret is None:
            return
        oldest = jnp.maximum(count - self.stages, 0)
        lax.fori_loop(oldest, count, lambda n, _: plgpu.barrier_wait(self.empty.at[self.slot(n)]), None)


def split(settings: Settings, refs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits a kernel's references into the tables of the rotation, if there are any, and the outputs and scratch."""
    tables = 2 if settings.rotated else 0
    return refs[:tables], refs[tables:]


def fetch(barrier: Any, *copies: tuple[Any, Any]) -> None:
    """Copies each (source, destination) from global to shared memory and waits. `barrier` counts one arrival per
    copy."""
    for source, destination in copies:
        plgpu.copy_gmem_to_smem(source, destination, barrier)
    plgpu.barrier_wait(barrier)


def store(*copies: tuple[Any, Any]) -> None:
    """Copies each (source, destination) from shared to global memory, including what was just written, and waits."""
    plgpu.commit_smem()
    for source, destination in copies:
        plgpu.copy_smem_to_gmem(source, destination)
    plgpu.wait_smem_to_gmem(0)


def copy_blocks(settings: Settings, first: Any, stop: Any, load: Callable[[Any], None], *pipelines: Pipeline) -> None:
    """The whole program of the copying warpgroup: calls `load` for each block in [first, stop), to fill `pipelines`."""
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    lax.fori_loop(first, stop, lambda n, _: load(n), None)
    for pipeline in pipelines:
        pipeline.drain(settings, stop - first)


def visit_ranges(bounds: tuple[Any, ...], visit: Callable[[Any, Any, bool], Any], sums: Any) -> Any:
    """Calls `visit` for the blocks of a tile between its four bounds, without a mask for the blocks in the middle.
    Returns the final sums."""
    for start, stop, masked in zip(bounds[:3], bounds[1:], (True, False, True), strict=True):
        sums = lax.fori_loop(start, stop, lambda j, sums, masked=masked: visit(j, sums, masked), sums)
    return sums


def indices(first: Any) -> Array:
    """The indices of a warpgroup's rows, of which `first` is the first."""
    return first + lax.broadcasted_iota(jnp.int32, (ROWS,), 0)


def mask(scores_rs: Array, low_r: Array, high_r: Array, column_rs: Array) -> Array:
    """The scores, set to LOWEST where the column is outside the row's [low, high)."""
    seen_rs = (column_rs >= along(low_r, scores_rs.shape, 0)) & (column_rs < along(high_r, scores_rs.shape, 0))
    return jnp.where(seen_rs, scores_rs, LOWEST)


def kernel(
    body: Callable[..., None], settings: Settings, name: str, *, shape: tuple[int, ...], products: int, **arguments: Any
) -> Callable[..., Any]:
    """`plgpu.kernel` over a grid of (heads, tiles, batch), with one warpgroup more than those that compute.

    `shape` (of the queries) and `products` (matrix products per pair of a query and a key) determine the cost estimate
    for XLA. It assumes one document per row, because which blocks are skipped is known only at run time.
    """
    batch, length, heads, size = shape
    pairs = batch * heads * length * (length + 1) // 2
    moved = (2 + 2 // settings.group) * products // 2 * 2 * batch * length * heads * size
    cost = pl.CostEstimate(flops=2 * products * pairs * size, transcendentals=pairs, bytes_accessed=moved)
    if _TAKES_COST:
        arguments["cost_estimate"] = cost
    return plgpu.kernel(
        body,
        grid_names=("heads", "tiles", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        interpret=settings.interpret,
        kernel_name=name,
        **arguments,
    )


def product(settings: Settings, a_rH: Any, b_sH: Any, meanwhile: Callable[[], None]) -> Array:
    """a b^T of two tiles in shared memory, float32. `meanwhile` runs while the tensor cores work.

    The interpreter supports neither transposed tiles nor operands in registers, so that XLA computes the product there.
    """
    if settings.interpret is not None:
        meanwhile()
        return _product(a_rH[...], b_sH[...], ((1,), (1,)))

    def run(total: Any) -> Array:
        plgpu.wgmma(total, a_rH, b_sH.transpose((1, 0)))
        meanwhile()
        return total[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a_rH.shape[0], b_sH.shape[0]), jnp.float32))


def add_products(settings: Settings, *terms: tuple[Array, Any, Any]) -> list[Array]:
    """For each (total, a, b): total + a b where a is in registers and b is a tile in shared memory, and total + a b^T
    where both are tiles.
    """

    def run(totals: list[Any]) -> None:
        for total, (_, a, b) in zip(totals, terms, strict=True):
            plgpu.wgmma(total, a, b if isinstance(a, Array) else b.transpose((1, 0)))

    if settings.interpret is None:
        start: Any = [plgpu.WGMMAAccumulatorRef.init(total) for total, _, _ in terms]
        return pl.run_state(run)(start)
    return [
        total + (_product(a, b[...], ((1,), (0,))) if isinstance(a, Array) else _product(a[...], b[...], ((1,), (1,))))
        for total, a, b in terms
    ]


def _product(a: Array, b: Array, contracting: Any) -> Array:
    return lax.dot_general(a, b, (contracting, ((), ())), preferred_element_type=jnp.float32)


def along(row: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Broadcasts a vector to a matrix of `shape`; it varies along `axis`."""
    return lax.broadcast_in_dim(row, shape, (axis,))


def angles(settings: Settings, tables: tuple[Any, ...], b: Any, rows: Any) -> tuple[Array, Array]:
    """Cosines and sines for a tile's rows, [r, E], read directly from global memory because they are used only once."""
    cos, sin = (table.at[b, rows] for table in tables)
    if settings.interpret is not None:
        return cos[...], sin[...]
    return plgpu.load(cos, *_LOAD_INDEX, optimized=False), plgpu.load(sin, *_LOAD_INDEX, optimized=False)


def turn(first_rE: Array, second_rE: Array, angle: tuple[Array, Array], *, back: bool) -> tuple[Array, Array]:
    """RoPE of the two halves of float32 heads; with `back` the inverse."""
    cos_rE, sin_rE = angle
    if back:
        sin_rE = -sin_rE
    return first_rE * cos_rE - second_rE * sin_rE, second_rE * cos_rE + first_rE * sin_rE


def store_turned_back(settings: Settings, tile: Any, x_rH: Array, tables: tuple[Any, ...], b: Any, rows: Any) -> None:
    """Rotates float32 gradients of rotated heads back and writes them to a tile in shared memory."""
    if not tables:
        tile[...] = x_rH.astype(tile.dtype)
        return
    half = x_rH.shape[1] // 2
    first_rE, second_rE = turn(x_rH[:, :half], x_rH[:, half:], angles(settings, tables, b, rows), back=True)
    tile[:, :half] = first_rE.astype(tile.dtype)
    tile[:, half:] = second_rE.astype(tile.dtype)
