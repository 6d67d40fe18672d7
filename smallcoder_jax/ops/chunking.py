"""Dynamic chunking (H-Net, arXiv 2507.07955, section 2.2) on static shapes, for packed documents.

A router gives the probability that a position begins a chunk. An inner stage works on the hidden states at these
beginnings. Its outputs are smoothed, and every position receives the output of its chunk.

Shapes: B batch, T positions, M chunks of a row (its capacity), D width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from smallcoder_jax.ops.packed import places_of
from smallcoder_jax.ops.recurrence import recurrence

LEAST = 1e-4  # the smallest share of a chunk in its smoothed output, and of the chunk before it
SMALLEST_NORM = 1e-8  # a vector that is shorter is not normalised to length 1


class Chunks(NamedTuple):
    """The chunks of packed rows. Slots without a chunk have segment 0."""

    states_BMD: Array
    shares_BM: Array  # the router's probability at the beginning
    segment_ids_BM: Array  # int32
    starts_BM: Array  # bool: the first chunk of a document
    places_BM: Array  # int32: where the chunk begins; anything for a slot without a chunk
    of_BT: Array  # int32: the slot of the chunk that a position belongs to
    overflow: Array  # float32: chunks that found no slot, the latest of their rows


def boundary_probability(
    queries_BTD: Float[Array, "B T D"],
    keys_BTD: Float[Array, "B T D"],
    starts_BT: Bool[Array, "B T"],
    before_BD: Float[Array, "B D"],
) -> Float[Array, "B T"]:
    """p_t = (1 - cos(query_{t-1}, key_t)) / 2 in float32 (eq. 4), and 1 where a document starts. `queries` and `keys`
    are the hidden states after the two projections of the router, and `before_BD` is the query of the position before
    the first. A probability depends on no later position.
    """
    before_BTD = jnp.concatenate([before_BD[:, None], queries_BTD[:, :-1]], axis=1)
    before_BTD, keys_BTD = (_directions(x_BTD.astype(jnp.float32)) for x_BTD in (before_BTD, keys_BTD))
    cosine_BT = jnp.sum(before_BTD * keys_BTD, axis=-1)
    return jnp.where(starts_BT, 1.0, jnp.clip((1.0 - cosine_BT) / 2.0, 0.0, 1.0))


def _directions(x_BTD: Array) -> Array:
    return x_BTD * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_BTD**2, axis=-1, keepdims=True), SMALLEST_NORM**2))


def boundaries(probability_BT: Float[Array, "B T"], segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where chunks begin: above one half, and never in padding."""
    return (probability_BT > 0.5) & (segment_ids_BT > 0)


def chunk(
    states_BTD: Float[Array, "B T D"],
    probability_BT: Float[Array, "B T"],
    boundary_BT: Bool[Array, "B T"],
    starts_BT: Bool[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    capacity: int,
) -> Chunks:
    """The states at the boundaries, in order. With a `capacity` of T there is room for all of them. With a smaller one
    the latest of a row are dropped and counted, and `dechunk` returns 0 for their positions."""
    of_BT = jnp.cumsum(boundary_BT.astype(jnp.int32), axis=1) - 1
    count_B1 = of_BT[:, -1:] + 1
    places_BM = places_of(boundary_BT)[:, :capacity]
    filled_BM = jnp.arange(capacity, dtype=jnp.int32)[None] < count_B1

    def taken(x_BT: Array) -> Array:
        return jnp.where(filled_BM, jnp.take_along_axis(x_BT, places_BM, axis=1), jnp.zeros((), x_BT.dtype))

    return Chunks(
        states_BMD=_take(states_BTD, places_BM, filled_BM, of_BT, boundary_BT),
        shares_BM=_take(probability_BT[..., None], places_BM, filled_BM, of_BT, boundary_BT)[..., 0],
        segment_ids_BM=taken(segment_ids_BT),
        starts_BM=taken(starts_BT),
        places_BM=places_BM,
        of_BT=of_BT,
        overflow=jnp.sum(jnp.maximum(count_B1 - capacity, 0)).astype(jnp.float32),
    )


# The gradient of a gather is a scatter, which compilers for CPUs make a loop over its rows, and those for other devices
# a sum without an order. Here it is known which row went where, so both gradients are gathers, too.
@jax.custom_vjp
def _take(x_BTD: Array, places_BM: Array, filled_BM: Array, of_BT: Array, boundary_BT: Array) -> Array:
    """The rows of x at `places`, and 0 where no chunk is. `of` and `boundary` say where each position went."""
    return jnp.where(filled_BM[..., None], jnp.take_along_axis(x_BTD, places_BM[..., None], axis=1), 0.0)


def _take_forward(
    x_BTD: Array, places_BM: Array, filled_BM: Array, of_BT: Array, boundary_BT: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _take(x_BTD, places_BM, filled_BM, of_BT, boundary_BT), (of_BT, boundary_BT)


def _take_backward(residuals: tuple[Array, Array], dy_BMD: Array) -> tuple[Array | None, ...]:
    of_BT, boundary_BT = residuals
    last = dy_BMD.shape[1] - 1
    dx_BTD = jnp.take_along_axis(dy_BMD, jnp.clip(of_BT, 0, last)[..., None], axis=1)
    return jnp.where((boundary_BT & (of_BT <= last))[..., None], dx_BTD, 0.0), None, None, None, None


_take.defvjp(_take_forward, _take_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _spread(z_BMD: Array, before_BD: Array, places_BM: Array, place_BT: Array, implementation: str) -> Array:
    """The row of z at `place`, or `before` where that is -1. `place` grows along a row; it is first m at `places_m`."""
    all_BMD = jnp.concatenate([before_BD[:, None], z_BMD], axis=1)
    return jnp.take_along_axis(all_BMD, place_BT[..., None] + 1, axis=1)


def _spread_forward(
    z_BMD: Array, before_BD: Array, places_BM: Array, place_BT: Array, implementation: str
) -> tuple[Array, tuple[Array, Array]]:
    return _spread(z_BMD, before_BD, places_BM, place_BT, implementation), (places_BM, place_BT)


def _spread_backward(implementation: str, residuals: tuple[Array, Array], dy_BTD: Array) -> tuple[Array | None, ...]:
    """The sum over the positions of each row, by a recurrence from the end that begins anew with each of them."""
    places_BM, place_BT = residuals
    first_BT = jnp.concatenate([jnp.ones_like(place_BT[:, :1]), jnp.diff(place_BT, axis=1)], axis=1) != 0
    # From the end, a position is added to the one behind it unless that is the first of another row.
    keep_BT = jnp.concatenate([~first_BT[:, 1:], jnp.zeros_like(first_BT[:, :1])], axis=1).astype(jnp.float32)
    keep_BTD, new_BTD = (
        jnp.flip(x, axis=1) for x in (jnp.broadcast_to(keep_BT[..., None], dy_BTD.shape), dy_BTD.astype(jnp.float32))
    )
    sums_BTD = jnp.flip(
        recurrence(keep_BTD, new_BTD, jnp.zeros_like(new_BTD[:, 0]), implementation=implementation), axis=1
    )
    d_z_BMD = jnp.take_along_axis(sums_BTD, places_BM[..., None], axis=1)
    used_BM = jnp.arange(places_BM.shape[1], dtype=jnp.int32)[None] <= place_BT[:, -1:]
    d_before_BD = jnp.where(place_BT[:, :1] < 0, sums_BTD[:, 0], 0.0)
    return jnp.where(used_BM[..., None], d_z_BMD, 0.0), d_before_BD, None, None


_spread.defvjp(_spread_forward, _spread_backward)


def chunk_positions(chunks: Chunks, last_B: Int[Array, " B"]) -> tuple[Int[Array, "B M"], Int[Array, " B"]]:
    """The position of each chunk in its document, counted in chunks, and that of the last chunk of each row. `last_B`
    is that of the chunk before the row, or -1. Slots without a chunk repeat the position before them.
    """
    slots_M = jnp.arange(chunks.starts_BM.shape[1], dtype=jnp.int32)[None]
    filled_BM = chunks.segment_ids_BM > 0  # the first slots of a row
    starts_BM = jnp.where(chunks.starts_BM, slots_M, -1 - last_B[:, None])  # where position 0 would be
    positions_BM = slots_M - jax.lax.cummax(starts_BM, axis=1)
    count_B = jnp.sum(filled_BM, axis=1, dtype=jnp.int32)
    last_found_B = jnp.take_along_axis(positions_BM, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    last_found_B = jnp.where(count_B > 0, last_found_B, last_B)
    return jnp.where(filled_BM, positions_BM, last_found_B[:, None]), last_found_B


def dechunk(
    outputs_BMD: Float[Array, "B M D"],
    chunks: Chunks,
    segment_ids_BT: Int[Array, "B T"],
    before_BD: Float[Array, "B D"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The smoothed output of each position's chunk: z_m = q_m output_m + (1 - q_m) z_{m-1}, where q is the share of the
    chunk, in float32 (eq. 5), and the last one of each row. `before_BD` is that of the chunk before the first position.
    Nothing crosses from one document to another, and padding gets 0. `implementation` is that of the recurrence.
    """
    share_BM = jnp.clip(chunks.shares_BM, LEAST, 1.0 - LEAST)
    share_BM = jnp.where(chunks.starts_BM, 1.0, share_BM)
    filled_BM = chunks.segment_ids_BM > 0
    keep_BM = jnp.where(filled_BM, 1.0 - share_BM, 1.0)
    new_BMD = jnp.where(filled_BM, share_BM, 0.0)[..., None] * outputs_BMD.astype(jnp.float32)
    # A kernel reads `keep` for every channel. That is a third more than it would have to move, but a scan, even one of
    # a single `keep` for all channels, moves seven times as much.
    keep_BMD = jnp.broadcast_to(keep_BM[..., None], new_BMD.shape)
    z_BMD = recurrence(keep_BMD, new_BMD, before_BD, implementation=implementation)
    place_BT = jnp.minimum(chunks.of_BT, outputs_BMD.shape[1] - 1)
    back_BTD: Array = _spread(z_BMD, before_BD, chunks.places_BM, place_BT, implementation)
    found_BT = (place_BT == chunks.of_BT) & (segment_ids_BT > 0)
    return jnp.where(found_BT[..., None], back_BTD, 0.0), z_BMD[:, -1]


def confidence(probability_BT: Float[Array, "B T"], boundary_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """1, with the gradient of the probability of what was decided: p at a boundary, 1 - p elsewhere (eqs. 6 and 7)."""
    decided_BT = jnp.where(boundary_BT, probability_BT, 1.0 - probability_BT)
    return decided_BT + jax.lax.stop_gradient(1.0 - decided_BT)


def ratio_loss(
    probability_BT: Float[Array, "B T"],
    boundary_BT: Bool[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    target: float,
) -> Float[Array, ""]:
    """N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)) over the positions that are no padding (eq. 10): F is the share of
    boundaries, G the mean probability, and N = `target` positions to a chunk. It is 1 where both are 1 / N.
    """
    real_BT = (segment_ids_BT > 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real_BT), 1.0)
    share = jnp.sum(boundary_BT.astype(jnp.float32) * real_BT) / count
    mean = jnp.sum(probability_BT * real_BT) / count
    return target / (target - 1.0) * ((target - 1.0) * share * mean + (1.0 - share) * (1.0 - mean))
