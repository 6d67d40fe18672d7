"""The byte-level model: stages of recurrent blocks, with dynamic chunking between them.

Shapes: B batch, T positions, M chunks of a row, D width of a stage, E width of the stage within, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from smallcoder_jax.config import ComputeConfig, HnetConfig
from smallcoder_jax.layers.embedding import Embedding
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.layers.ternary import BitLinear
from smallcoder_jax.mesh import split_activations
from smallcoder_jax.models.family import Hidden
from smallcoder_jax.models.hnet.blocks import Row, Stack, State, empty_states, projection
from smallcoder_jax.ops import chunking
from smallcoder_jax.ops.packed import latest
from smallcoder_jax.ops.ternary import rounded_activations


class Routed(NamedTuple):
    """How a stage divided its positions: [B, T] each, and the number of chunks that found no room."""

    probability_BT: Array
    boundary_BT: Array
    segment_ids_BT: Array
    overflow: Array


class Outer(nnx.Module):
    """A stage with another within: blocks, chunks, the stage within on the chunks, and blocks again."""

    def __init__(self, model: HnetConfig, stage: int, compute: ComputeConfig, *, rngs: nnx.Rngs):
        width, within = model.widths[stage : stage + 2]
        self.model, self.width, self.recurrence = model, width, compute.recurrence
        self.encoder = Stack(model, compute, stage, "x" * model.encoder_blocks[stage], rngs=rngs)
        self.router = Router(width)
        self.residual = Linear(width, width, bias=True, std=0.0, dtype=jnp.float32, rngs=rngs)
        self.wider = nnx.Param(jnp.zeros((within - width,), jnp.float32))
        self.inner = make_stage(model, stage + 1, compute, rngs=rngs)
        self.decoder = Stack(model, compute, stage, "x" * model.decoder_blocks[stage], rngs=rngs)

    def __call__(self, x_BTD: Array, row: Row, state: State) -> tuple[Array, State, list[Routed]]:
        encoded_BTD, encoder = self.encoder(x_BTD, row, state["encoder"])
        probability_BT, query_BD = self.router(encoded_BTD, row, state["query"])
        boundary_BT = chunking.boundaries(probability_BT, row.segment_ids_BT)
        # A row that continues a state, in generation, has room for all chunks that there can be.
        room = x_BTD.shape[1] if row.extends else self.model.room(x_BTD.shape[1])
        chunks = chunking.chunk(encoded_BTD, probability_BT, boundary_BT, row.starts_BT, row.segment_ids_BT, room)
        positions_BM, last_B = chunking.chunk_positions(chunks, state["last_chunk"])
        inner_row = Row(positions_BM, chunks.segment_ids_BM, row.extends)
        outputs_BMD, inner, routed = self._within(chunks.states_BMD, inner_row, state["inner"])
        back_BTD, smoothed_BD = chunking.dechunk(
            outputs_BMD, chunks, row.segment_ids_BT, state["smoothed"], self.recurrence
        )
        confidence_BT1 = chunking.confidence(probability_BT, boundary_BT)[..., None]
        skipped_BTD = self.residual(encoded_BTD.astype(jnp.float32))
        mixed_BTD = split_activations((back_BTD * confidence_BT1 + skipped_BTD).astype(x_BTD.dtype))
        decoded_BTD, decoder = self.decoder(mixed_BTD, row, state["decoder"])
        state = {
            "encoder": encoder,
            "query": query_BD,
            "last_chunk": last_B,
            "inner": inner,
            "smoothed": smoothed_BD,
            "decoder": decoder,
        }
        own = Routed(probability_BT, boundary_BT, row.segment_ids_BT, chunks.overflow)
        return decoded_BTD, state, [own, *routed]

    def _within(self, states_BMD: Array, row: Row, state: State) -> tuple[Array, State, list[Routed]]:
        """The stage within, on states that are made wider, and cut to this stage's width again."""
        shape = (*states_BMD.shape[:2], self.wider.shape[0])
        wider_BME = jnp.broadcast_to(self.wider[...].astype(states_BMD.dtype), shape)
        x_BME = jnp.concatenate([states_BMD, wider_BME], axis=-1)

        def compute(x_BME: Array, state: State) -> tuple[Array, State, list[Routed]]:
            y_BME, state, routed = self.inner(x_BME, row, state)
            return y_BME[..., : self.width], state, routed

        if not (row.extends and x_BME.shape[1] == 1):
            return compute(x_BME, state)
        # Between two boundaries, a step of generation costs nothing here.
        outputs_BMD, state = jax.lax.cond(
            jnp.any(row.segment_ids_BT > 0), lambda: compute(x_BME, state)[:2], lambda: (states_BMD, state)
        )
        return outputs_BMD, state, []


class Inner(nnx.Module):
    """The innermost stage: blocks alone."""

    def __init__(self, model: HnetConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.stack = Stack(model, compute, len(model.inner_widths), model.kinds, rngs=rngs)

    def __call__(self, x_BTD: Array, row: Row, state: State) -> tuple[Array, State, list[Routed]]:
        x_BTD, states = self.stack(x_BTD, row, state["stack"])
        return x_BTD, {"stack": states}, []


class Router(nnx.Module):
    """Two projections in full precision, which begin as the identity."""

    def __init__(self, width: int):
        self.query = nnx.Param(jnp.eye(width, dtype=jnp.float32))
        self.key = nnx.Param(jnp.eye(width, dtype=jnp.float32))

    def __call__(self, x_BTD: Array, row: Row, before_BD: Array) -> tuple[Array, Array]:
        """The probabilities, and the query of the last position that is no padding."""
        x_BTD = x_BTD.astype(jnp.float32)
        queries_BTD, keys_BTD = (
            jnp.matmul(x_BTD, kernel[...], precision=jax.lax.Precision.HIGHEST) for kernel in (self.query, self.key)
        )
        probability_BT = chunking.boundary_probability(queries_BTD, keys_BTD, row.starts_BT, before_BD)
        all_BTD = jnp.concatenate([before_BD[:, None], queries_BTD], axis=1)
        real_BT = jnp.pad(row.segment_ids_BT > 0, [(0, 0), (1, 0)], constant_values=True)
        return probability_BT, latest(all_BTD, real_BT, 1)[:, 0]


def make_stage(model: HnetConfig, stage: int, compute: ComputeConfig, *, rngs: nnx.Rngs) -> Outer | Inner:
    if stage == len(model.inner_widths):
        return Inner(model, compute, rngs=rngs)
    return Outer(model, stage, compute, rngs=rngs)


class Hnet(nnx.Module):
    """Bytes to hidden states. A ternary head multiplies rounded numbers: hidden states and unembedding are returned
    rounded, with straight-through gradients."""

    def __init__(self, model: HnetConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.model, self.compute = model, compute
        self.embed = Embedding(model.vocab_size, model.width, rngs=rngs)
        self.stage = make_stage(model, 0, compute, rngs=rngs)
        self.head = projection(
            model.width,
            model.vocab_size,
            ternary=model.is_ternary(0),
            dtype=jnp.dtype(compute.dtype),
            rngs=rngs,
            std=0.4 * model.width**-0.5,
        )

    def __call__(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, dropout_key: Array | None = None
    ) -> Hidden:
        """See `Module`. Its own loss is `ratio`, which leads to chunks of the target's mean length."""
        del dropout_key  # there is no dropout
        rows, length = tokens_BT.shape
        start = init_state(self.model, rows, length, self.compute.dtype)
        states_BTD, _, routed = self._states(tokens_BT, positions_BT, segment_ids_BT, start, extends=False)
        count = jnp.sum(segment_ids_BT > 0).astype(jnp.float32)
        observed = {}
        ratio = jnp.float32(0.0)
        for number, stage in enumerate(routed, 1):
            begun = jnp.sum(stage.boundary_BT).astype(jnp.float32)
            real = jnp.sum(stage.segment_ids_BT > 0).astype(jnp.float32)
            observed |= {f"boundaries_{number}": (begun, real), f"overflow_{number}": (stage.overflow, begun)}
            observed[f"chunk_length_{number}"] = (real, begun)
            ratio += chunking.ratio_loss(
                stage.probability_BT, stage.boundary_BT, stage.segment_ids_BT, self.model.chunk_target
            )
        return Hidden(states_BTD, {"ratio": (self.model.ratio_weight * ratio * count, count)}, observed)

    def extend(self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, cache: State) -> tuple[Array, State]:
        states_BTD, cache, _ = self._states(tokens_BT, positions_BT, segment_ids_BT, cache, extends=True)
        return states_BTD, cache

    def boundaries(self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array) -> list[tuple[Array, Array]]:
        """See `Family.boundaries`. A stage within has probabilities only where a chunk of the stage around it begins,
        and 0 elsewhere. There is room for all chunks, as in generation."""
        rows, length = tokens_BT.shape
        start = init_state(self.model, rows, length, self.compute.dtype)
        *_, routed = self._states(tokens_BT, positions_BT, segment_ids_BT, start, extends=True)
        found: list[tuple[Array, Array]] = []
        here_BT = segment_ids_BT > 0  # the tokens at which a slot of the stage begins
        slots_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        for stage in routed:
            probability_BT, begins_BT = (
                jnp.take_along_axis(x_BM, slots_BT, axis=1) for x_BM in (stage.probability_BT, stage.boundary_BT)
            )
            begins_BT = begins_BT & here_BT
            found.append((begins_BT, jnp.where(here_BT, probability_BT, 0.0)))
            here_BT, slots_BT = begins_BT, jnp.maximum(jnp.cumsum(begins_BT.astype(jnp.int32), axis=1) - 1, 0)
        return found

    def decide(self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array) -> tuple[Array, list[Array]]:
        """The hidden states of whole rows as `extend` computes them, with room for every chunk; and where chunks begin:
        [B, T] for the outermost stage, and [B, slots of the stage before] for each within. Of rows of one position,
        those within are not reported.
        """
        rows, length = tokens_BT.shape
        start = init_state(self.model, rows, length, self.compute.dtype)
        states_BTD, _, routed = self._states(tokens_BT, positions_BT, segment_ids_BT, start, extends=True)
        return states_BTD, [stage.boundary_BT for stage in routed]

    def unembedding(self) -> Array:
        kernel_DV = self.head.rounded_kernel() if isinstance(self.head, BitLinear) else self.head.kernel[...]
        return kernel_DV.T

    def _states(
        self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array, state: State, *, extends: bool
    ) -> tuple[Array, State, list[Routed]]:
        row = Row(positions_BT, segment_ids_BT, extends)
        x_BTD = split_activations(self.embed(tokens_BT).astype(self.compute.dtype))
        x_BTD, state, routed = self.stage(x_BTD, row, state)
        if isinstance(self.head, BitLinear):
            x_BTD = rounded_activations(self.head.normed(x_BTD))
        return x_BTD, state, routed


def init_state(model: HnetConfig, rows: int, positions: int, dtype: DTypeLike) -> State:
    """The state of no text, for at most `positions` positions."""

    def of_stage(stage: int) -> State:
        width = model.widths[stage]

        def of_stack(kinds: str) -> list[State]:
            return empty_states(model, stage, kinds, rows, positions, dtype)

        if stage == len(model.inner_widths):
            return {"stack": of_stack(model.kinds)}
        return {
            "encoder": of_stack("x" * model.encoder_blocks[stage]),
            "query": jnp.zeros((rows, width), jnp.float32),
            "last_chunk": jnp.full((rows,), -1, jnp.int32),  # the position of the last chunk in its document
            "inner": of_stage(stage + 1),
            "smoothed": jnp.zeros((rows, width), jnp.float32),
            "decoder": of_stack("x" * model.decoder_blocks[stage]),
        }

    return of_stage(0)
