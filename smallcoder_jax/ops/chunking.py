"""Dynamic chunking (H-Net, arXiv 2507.07955, section 2.2) on static shapes, for packed documents.

A router gives the probability that a position begins a chunk. An inner stage works on the hidden states at these
beginnings. Its outputs are smoothed, and every position receives the output of its chunk.

Shapes: B batch, T positions, M chunks of a row (its capacity), D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from smallcoder_jax.ops.recurrence import recurrence

LEAST = 1e-4  # the smallest share of a chunk in its smoothed output, and of the chunk before it
SMALLEST_NORM = 1e-8  # a vector that is shorter is not normalised to length 1


class Chunks(NamedTuple):
    """The chunks of packed rows. Slots without a chunk have segment 0."""

    states_BMD: Array
    shares_BM: Array  # the router's probability at the beginning
    segment_ids_BM: Array  # int32
    starts_BM: Array  # bool: the first chunk of a document
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
    slots_BT = jnp.where(boundary_BT, of_BT, capacity)  # beyond the last one: dropped

    def taken(x_BT: Array) -> Array:
        def of_row(x_T: Array, slots_T: Array) -> Array:
            return jnp.zeros((capacity, *x_T.shape[1:]), x_T.dtype).at[slots_T].set(x_T, mode="drop")

        return jax.vmap(of_row)(x_BT, slots_BT)

    overflow = jnp.sum(jnp.maximum(of_BT[:, -1] + 1 - capacity, 0)).astype(jnp.float32)
    return Chunks(
        states_BMD=taken(states_BTD),
        shares_BM=taken(probability_BT),
        segment_ids_BM=taken(segment_ids_BT),
        starts_BM=taken(starts_BT),
        of_BT=of_BT,
        overflow=overflow,
    )


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
    all_BMD = jnp.concatenate([before_BD[:, None], z_BMD], axis=1)  # slot 0: the chunk before
    place_BT = jnp.minimum(chunks.of_BT, outputs_BMD.shape[1] - 1)
    back_BTD = jnp.take_along_axis(all_BMD, place_BT[..., None] + 1, axis=1)
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
