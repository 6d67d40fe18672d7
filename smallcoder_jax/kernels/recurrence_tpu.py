"""The linear recurrence h_t = keep_t h_{t-1} + new_t for TPUs (Pallas Mosaic), each pass over HBM once.

The last axis of the grid runs over blocks of positions, one after the other, with the state between two blocks in VMEM;
the backward pass runs over them from last to first. Within a block the kernels go through tiles of 8 positions, the
sublanes of a register. A tile takes three steps of a scan over its sublanes, which depend on no other tile, and one
multiplication and addition for the state before it, so that little waits for the tile before.

Shapes: B batch, T positions, E channels, s SUBLANES positions of a tile, g GROUP positions, c channels of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from smallcoder_jax.kernels.flash_tpu import VMEM_MIB

LANES, SUBLANES = 128, 8
GROUP = 16  # positions that are loaded at once: one tile of bfloat16, two of float32
# The largest block. In the backward pass ten of them are in VMEM: 10 MiB in float32.
POSITIONS, CHANNELS = 512, 512
KINDS = tuple(VMEM_MIB)
DTYPES = ("float32", "bfloat16")


class Settings(NamedTuple):
    """The static parameters that a kernel is compiled for."""

    new_dtype: DTypeLike  # that of the gradient of `new`, too
    interpret: bool


def obstacle(width: int, dtypes: Iterable[DTypeLike], device: str | None) -> str | None:
    """Why the kernels cannot serve inputs of these types on a kind of device, or None if they can (also for one that is
    no TPU, which only interprets a kernel). Any length and width is possible.
    """
    del width
    if device is not None and device.startswith("TPU") and device not in KINDS:
        return f"it is made for {', '.join(KINDS)}, not for {device}"
    unknown = [name for name in (jnp.dtype(dtype).name for dtype in dtypes) if name not in DTYPES]
    return f"it serves {' and '.join(DTYPES)}, not {unknown[0]}" if unknown else None


def recurrence(keep_BTE: Array, new_BTE: Array, start_BE: Array, *, interpret: bool = False) -> Array:
    """All h_t of h_t = keep_t h_{t-1} + new_t with h_{-1} = `start_BE`: float32 [B, T, E], differentiable.

    `keep_BTE` and `new_BTE` are float32 or bfloat16, also their gradients; everything else is float32.
    """
    return _recurrence(Settings(new_BTE.dtype, interpret), keep_BTE, new_BTE, start_BE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings: Settings, keep_BTE: Array, new_BTE: Array, start_BE: Array) -> Array:
    return _forward(settings, keep_BTE, new_BTE, start_BE)[0]


def _forward(settings: Settings, keep_BTE: Array, new_BTE: Array, start_BE: Array) -> tuple[Array, Any]:
    blocks = _Blocks(keep_BTE.shape, reverse=False)
    h = jax.ShapeDtypeStruct(keep_BTE.shape, jnp.float32)
    h_BTE = pl.pallas_call(
        _forward_kernel,
        grid=blocks.grid,
        in_specs=[blocks.positions, blocks.positions, blocks.state],
        out_specs=blocks.positions,
        out_shape=h,
        scratch_shapes=[blocks.carried],
        compiler_params=blocks.compiler_params,
        cost_estimate=_cost(keep_BTE, new_BTE, h),
        interpret=settings.interpret,
        name="recurrence_forward",
    )(keep_BTE, new_BTE, start_BE[:, None, :])
    return h_BTE, (keep_BTE, h_BTE, start_BE)


def _backward(settings: Settings, residuals: tuple[Array, ...], dh_BTE: Array) -> tuple[Array, Array, Array]:
    keep_BTE, h_BTE, start_BE = residuals
    blocks = _Blocks(keep_BTE.shape, reverse=True)
    new_BTE = jax.ShapeDtypeStruct(keep_BTE.shape, settings.new_dtype)
    start_B1E = start_BE[:, None, :]
    d_keep_BTE, d_new_BTE, d_start_B1E = pl.pallas_call(
        functools.partial(_backward_kernel, keep_BTE.shape[1]),
        grid=blocks.grid,
        in_specs=[blocks.positions, blocks.positions, blocks.tile_before, blocks.positions, blocks.state],
        out_specs=[blocks.positions, blocks.positions, blocks.state],
        out_shape=[jax.ShapeDtypeStruct(keep_BTE.shape, keep_BTE.dtype), new_BTE, start_B1E],
        scratch_shapes=[blocks.carried],
        compiler_params=blocks.compiler_params,
        cost_estimate=_cost(keep_BTE, keep_BTE, new_BTE, h_BTE, dh_BTE),
        interpret=settings.interpret,
        name="recurrence_backward",
    )(keep_BTE, h_BTE, h_BTE, dh_BTE, start_B1E)
    return d_keep_BTE, d_new_BTE, d_start_B1E[:, 0, :]


_recurrence.defvjp(_forward, _backward)


class _Blocks:
    """The blocks that the kernels for arrays of this shape work on. A block at the end of a row or of the channels may
    reach beyond it: what is read there is arbitrary, and what is written there is dropped.
    """

    def __init__(self, shape: tuple[int, ...], *, reverse: bool):
        batch, length, width = shape
        size = min(POSITIONS, GROUP * pl.cdiv(length, GROUP))
        channels = next((each for each in range(CHANNELS, 0, -LANES) if width % each == 0), min(CHANNELS, width))
        count = pl.cdiv(length, size)
        self.grid = (batch, pl.cdiv(width, channels), count)

        def at(i: Any) -> Any:
            return count - 1 - i if reverse else i

        self.positions = pl.BlockSpec((1, size, channels), lambda b, e, i: (b, at(i), e))
        # The tile of positions before a block, and some tile before the first block.
        self.tile_before = pl.BlockSpec(
            (1, SUBLANES, channels), lambda b, e, i: (b, jnp.maximum(at(i) * (size // SUBLANES) - 1, 0), e)
        )
        self.state = pl.BlockSpec((1, 1, channels), lambda b, e, i: (b, 0, e))
        self.carried = pltpu.VMEM((1, channels), jnp.float32)
        self.compiler_params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _cost(*moved: Any) -> pl.CostEstimate:
    """The cost estimate for XLA of a kernel that reads or writes each of these arrays once."""
    flops = 20 * moved[0].size  # about: three steps of a scan and the state before it
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved))


def _forward_kernel(keep: Any, new: Any, start: Any, h: Any, carried: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = start[0]

    def group(g: Any, state_1c: Array) -> Array:
        rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
        keep_gc, new_gc = (x[0, rows, :].astype(jnp.float32) for x in (keep, new))
        tiles = []
        for tile in _tiles():
            kept_sc, sum_sc = _scan(keep_gc[tile], new_gc[tile], reverse=False)
            tiles.append(kept_sc * state_1c + sum_sc)
            state_1c = tiles[-1][-1:]
        h[0, rows, :] = jnp.concatenate(tiles)
        return state_1c

    carried[...] = jax.lax.fori_loop(0, h.shape[1] // GROUP, group, carried[...], unroll=2)


def _backward_kernel(
    length: int, keep: Any, h: Any, h_before: Any, dh: Any, start: Any, d_keep: Any, d_new: Any, d_start: Any,
    carried: Any,
) -> None:  # fmt: skip
    """`carried` is keep_t dnew_t of the first position of the block after: what the state before it receives."""
    size, i = h.shape[1], pl.num_programs(2) - 1 - pl.program_id(2)
    groups = size // GROUP

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        carried[...] = jnp.zeros_like(carried)

    before_block_1c = jnp.where(i == 0, start[0], h_before[0, -1:, :])
    row_s1 = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)

    def group(n: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_state_1c, h_gc = carry
        g = groups - 1 - n
        rows = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
        keep_gc, dh_gc = (x[0, rows, :].astype(jnp.float32) for x in (keep, dh))
        if length % size:  # the last block reaches beyond the row
            t_g1 = i * size + g * GROUP + jax.lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0)
            keep_gc, dh_gc = (jnp.where(t_g1 < length, x_gc, 0.0) for x_gc in (keep_gc, dh_gc))
        before_gc = h[0, pl.ds(pl.multiple_of(jnp.maximum(g - 1, 0) * GROUP, GROUP), GROUP), :]
        last_1c = jnp.where(g == 0, before_block_1c, before_gc[-1:])
        d_keeps, d_news = [], []
        for tile in reversed(_tiles()):
            # dnew_t = dh_t + keep_{t+1} dnew_{t+1}, and for the last position of the tile dh_t + d_state.
            following_sc = jnp.where(row_s1 < SUBLANES - 1, pltpu.roll(keep_gc[tile], SUBLANES - 1, 0), 1.0)
            kept_sc, sum_sc = _scan(following_sc, dh_gc[tile], reverse=True)
            d_new_sc = kept_sc * d_state_1c + sum_sc
            d_state_1c = keep_gc[tile][:1] * d_new_sc[:1]
            first_1c = last_1c if tile.start == 0 else h_gc[tile.start - 1 : tile.start]
            h_before_sc = jnp.where(row_s1 > 0, pltpu.roll(h_gc[tile], 1, 0), first_1c)
            d_keeps.append(d_new_sc * h_before_sc)
            d_news.append(d_new_sc)
        d_keep[0, rows, :] = jnp.concatenate(d_keeps[::-1]).astype(d_keep.dtype)
        d_new[0, rows, :] = jnp.concatenate(d_news[::-1]).astype(d_new.dtype)
        return d_state_1c, before_gc

    last_gc = h[0, pl.ds(size - GROUP, GROUP), :]
    d_state_1c, _ = jax.lax.fori_loop(0, groups, group, (carried[...], last_gc))
    carried[...] = d_state_1c
    d_start[0] = d_state_1c  # that of the first block is the last one to be written


def _tiles() -> list[slice]:
    return [slice(first, first + SUBLANES) for first in range(0, GROUP, SUBLANES)]


def _scan(keep_sc: Array, new_sc: Array, *, reverse: bool) -> tuple[Array, Array]:
    """The products of `keep` and the sums h up to each position of a tile, for a state of 0 before it; with `reverse`
    from the end (Hillis and Steele)."""
    row_s1 = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
    for distance in (1, 2, 4):
        inside_s1 = row_s1 < SUBLANES - distance if reverse else row_s1 >= distance
        shift = SUBLANES - distance if reverse else distance
        new_sc += keep_sc * jnp.where(inside_s1, pltpu.roll(new_sc, shift, 0), 0.0)
        keep_sc *= jnp.where(inside_s1, pltpu.roll(keep_sc, shift, 0), 1.0)
    return keep_sc, new_sc
