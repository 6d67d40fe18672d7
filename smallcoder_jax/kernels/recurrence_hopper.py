"""The linear recurrence h_t = keep_t h_{t-1} + new_t for NVIDIA Hopper (Pallas Mosaic GPU), each pass over HBM once.

A block of threads is one warpgroup, which owns CHANNELS channels of a row, one per thread. It walks over the
positions, with the state in a register; the backward pass walks from the last position to the first. Blocks of inputs
are in a ring in shared memory, which TMA fills ahead of the walk, so that enough bytes are on their way for the whole
bandwidth of the memory, however few blocks of threads there are. TMA also takes the outputs away.

Shapes: B batch, T positions (padded to whole blocks), E channels, c CHANNELS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from smallcoder_jax.kernels import hopper
from smallcoder_jax.kernels.flash_hopper import HOPPER

CHANNELS, POSITIONS = 128, 16
# Blocks of inputs in shared memory: two arrays in the forward pass and three in the backward pass. Together with those
# of outputs they take 176 KiB in float32.
STAGES, BACKWARD_STAGES, OUT_STAGES = 10, 6, 2
DTYPES = ("float32", "bfloat16")
# Without a barrier of all threads before and after every store: no thread reads what it or another one wrote.
COMPILER_PARAMS = plgpu.CompilerParams(
    unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)


class Settings(NamedTuple):
    """The static parameters that a kernel is compiled for."""

    new_dtype: DTypeLike  # that of the gradient of `new`, too
    interpret: Any  # the parameters of Mosaic GPU's interpreter, or None


def obstacle(width: int, dtypes: Iterable[DTypeLike], device: str | None) -> str | None:
    """Why the kernels cannot serve `width` channels of these types on a kind of device, or None if they can (also for a
    CPU, which interprets them). Any length is possible.
    """
    if device not in (None, "cpu") and not any(name in device for name in HOPPER):
        return f"it is made for NVIDIA Hopper (H100, H200), not for {device}"
    unknown = [name for name in (jnp.dtype(dtype).name for dtype in dtypes) if name not in DTYPES]
    if unknown:
        return f"it serves {' and '.join(DTYPES)}, not {unknown[0]}"
    return f"it serves multiples of {CHANNELS} channels on each device, not {width}" if width % CHANNELS else None


def recurrence(keep_BTE: Array, new_BTE: Array, start_BE: Array, *, interpret: Any = None) -> Array:
    """All h_t of h_t = keep_t h_{t-1} + new_t with h_{-1} = `start_BE`: float32 [B, T, E], differentiable.

    `keep_BTE` and `new_BTE` are float32 or bfloat16, also their gradients; everything else is float32. Rows are padded
    to whole blocks of POSITIONS.
    """
    length = keep_BTE.shape[1]
    pad = [(0, 0), (0, -length % POSITIONS), (0, 0)]
    keep_BTE, new_BTE = jnp.pad(keep_BTE, pad), jnp.pad(new_BTE, pad)
    h_BTE: Array = _recurrence(Settings(new_BTE.dtype, interpret), keep_BTE, new_BTE, start_BE)
    return h_BTE[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings: Settings, keep_BTE: Array, new_BTE: Array, start_BE: Array) -> Array:
    return _forward(settings, keep_BTE, new_BTE, start_BE)[0]


def _forward(settings: Settings, keep_BTE: Array, new_BTE: Array, start_BE: Array) -> tuple[Array, Any]:
    h = jax.ShapeDtypeStruct(keep_BTE.shape, jnp.float32)
    scratch = [_ring(STAGES, keep_BTE.dtype), _ring(STAGES, new_BTE.dtype), _ring(OUT_STAGES, h.dtype)]
    barriers = [plgpu.Barrier(num_arrivals=2, num_barriers=STAGES), plgpu.Barrier(num_arrivals=1)]
    kernel = _kernel(_forward_kernel, settings, "recurrence_forward", [h], [*scratch, *barriers])
    (h_BTE,) = kernel(keep_BTE, new_BTE, start_BE)
    return h_BTE, (keep_BTE, h_BTE, start_BE)


def _backward(settings: Settings, residuals: tuple[Array, ...], dh_BTE: Array) -> tuple[Array, ...]:
    keep_BTE, h_BTE, start_BE = residuals
    d_keep = jax.ShapeDtypeStruct(keep_BTE.shape, keep_BTE.dtype)
    d_new = jax.ShapeDtypeStruct(keep_BTE.shape, settings.new_dtype)
    d_start = jax.ShapeDtypeStruct(start_BE.shape, jnp.float32)
    scratch = [
        *(_ring(BACKWARD_STAGES, x.dtype) for x in (keep_BTE, h_BTE, dh_BTE)),
        plgpu.SMEM((BACKWARD_STAGES, CHANNELS), jnp.float32),
        *(_ring(OUT_STAGES, x.dtype) for x in (d_keep, d_new)),
        plgpu.Barrier(num_arrivals=4, num_barriers=BACKWARD_STAGES),
    ]
    kernel = _kernel(_backward_kernel, settings, "recurrence_backward", [d_keep, d_new, d_start], scratch)
    return tuple(kernel(keep_BTE, h_BTE, dh_BTE, start_BE))


_recurrence.defvjp(_forward, _backward)


def _ring(stages: int, dtype: DTypeLike) -> Any:
    return plgpu.SMEM((stages, POSITIONS, CHANNELS), dtype)


def _kernel(
    body: Callable[..., None], settings: Settings, name: str, out: list[jax.ShapeDtypeStruct], scratch: list[Any]
) -> Callable[..., Any]:
    batch, _, width = out[0].shape
    scratch.append(plgpu.SMEM((CHANNELS,), jnp.float32))  # a state
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(width // CHANNELS, batch),
        grid_names=("channels", "batch"),
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        interpret=settings.interpret,
        kernel_name=name,
    )


def _forward_kernel(
    keep: Any, new: Any, start: Any, h: Any, keep_ring: Any, new_ring: Any, h_ring: Any, loaded: Any, started: Any,
    state: Any,
) -> None:  # fmt: skip
    b, channels = lax.axis_index("batch"), pl.ds(lax.axis_index("channels") * CHANNELS, CHANNELS)

    def load(n: Any, slot: Any) -> None:
        block = (b, pl.ds(n * POSITIONS, POSITIONS), channels)
        plgpu.copy_gmem_to_smem(keep.at[block], keep_ring.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(new.at[block], new_ring.at[slot], loaded.at[slot])

    def work(slot: Any, out_slot: Any, state_c: Array) -> Array:
        inputs = [[ring[slot, t].astype(jnp.float32) for ring in (keep_ring, new_ring)] for t in range(POSITIONS)]
        for t, (keep_c, new_c) in enumerate(inputs):
            state_c = keep_c * state_c + new_c
            h_ring[out_slot, t] = state_c
        return state_c

    def store(n: Any, out_slot: Any) -> None:
        plgpu.copy_smem_to_gmem(h_ring.at[out_slot], h.at[b, pl.ds(n * POSITIONS, POSITIONS), channels])

    hopper.fetch(started, (start.at[b, channels], state))
    _walk(h.shape[1] // POSITIONS, loaded, load, work, store, state[...], stores=1)


def _backward_kernel(
    keep: Any, h: Any, dh: Any, start: Any, d_keep: Any, d_new: Any, d_start: Any, keep_ring: Any, h_ring: Any,
    dh_ring: Any, before_ring: Any, d_keep_ring: Any, d_new_ring: Any, loaded: Any, state: Any,
) -> None:  # fmt: skip
    b, channels = lax.axis_index("batch"), pl.ds(lax.axis_index("channels") * CHANNELS, CHANNELS)
    blocks = h.shape[1] // POSITIONS

    def positions(n: Any) -> Any:
        return pl.ds((blocks - 1 - n) * POSITIONS, POSITIONS)

    def load(n: Any, slot: Any) -> None:
        for source, ring in ((keep, keep_ring), (h, h_ring), (dh, dh_ring)):
            plgpu.copy_gmem_to_smem(source.at[b, positions(n), channels], ring.at[slot], loaded.at[slot])
        first = (blocks - 1 - n) * POSITIONS

        @pl.when(first > 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(h.at[b, first - 1, channels], before_ring.at[slot], loaded.at[slot])

        @pl.when(first == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(start.at[b, channels], before_ring.at[slot], loaded.at[slot])

    def work(slot: Any, out_slot: Any, d_state_c: Array) -> Array:
        """`d_state_c` is keep_t dnew_t of the first position of the block after: what the state before it receives."""
        keeps, dhs = ([ring[slot, t].astype(jnp.float32) for t in range(POSITIONS)] for ring in (keep_ring, dh_ring))
        befores = [before_ring[slot], *(h_ring[slot, t] for t in range(POSITIONS - 1))]
        for t in reversed(range(POSITIONS)):
            d_new_c = dhs[t] + d_state_c
            d_state_c = keeps[t] * d_new_c
            d_new_ring[out_slot, t] = d_new_c.astype(d_new.dtype)
            d_keep_ring[out_slot, t] = (d_new_c * befores[t]).astype(d_keep.dtype)
        return d_state_c

    def store(n: Any, out_slot: Any) -> None:
        for ring, result in ((d_keep_ring, d_keep), (d_new_ring, d_new)):
            plgpu.copy_smem_to_gmem(ring.at[out_slot], result.at[b, positions(n), channels])

    state[...] = _walk(blocks, loaded, load, work, store, jnp.zeros((CHANNELS,), jnp.float32), stores=2)
    hopper.store((state, d_start.at[b, channels]))


def _walk(
    blocks: int, loaded: Any, load: Callable[[Any, Any], None], work: Callable[[Any, Any, Array], Array],
    store: Callable[[Any, Any], None], state_c: Array, *, stores: int,
) -> Array:  # fmt: skip
    """Calls `work` for all blocks in their order, with the slots of its inputs and outputs and the state, and returns
    the last state. `load` starts the copies of a block's inputs, which arrive at its slot of the barrier `loaded`, and
    `store` those of its outputs, `stores` arrays.
    """
    stages = loaded.shape[0]
    for n in range(min(stages, blocks)):
        load(jnp.int32(n), jnp.int32(n))

    def step(n: Any, state_c: Array) -> Array:
        slot, out_slot = lax.rem(n, jnp.int32(stages)), lax.rem(n, jnp.int32(OUT_STAGES))
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.wait_smem_to_gmem(stores * (OUT_STAGES - 1), wait_read_only=True)
        state_c = work(slot, out_slot, state_c)
        plgpu.commit_smem()  # all threads have read the inputs and written the outputs
        store(n, out_slot)
        pl.when(n + stages < blocks)(lambda: load(n + stages, slot))
        return state_c

    state_c = lax.fori_loop(0, blocks, step, state_c)
    plgpu.wait_smem_to_gmem(0)
    return state_c
