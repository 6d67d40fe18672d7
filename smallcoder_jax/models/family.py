"""The interface of a family of models. The rest of the package uses models only through it and knows none by name.

Shapes: B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from smallcoder_jax.config import ComputeConfig
from smallcoder_jax.models.published import Published

Cache = Any  # a family's own pytree: arrays have rows as their first axis, scalars are the same for all rows


class Hidden(NamedTuple):
    """The output of a model: normed hidden states, from which logits and scores are computed, and its own losses.

    `losses` maps the name of each loss to its sum and its weight. The quotient of the two is added to the stage's loss
    per token. `observed` has the same form, for quantities that are logged and not learned.
    """

    states_BTD: Array
    losses: Mapping[str, tuple[Array, Array]] = {}
    observed: Mapping[str, tuple[Array, Array]] = {}


class Module(Protocol):
    """An `nnx.Module` of a family. Its parameters are float32. Identical layers are in a list `blocks` or, with
    `compute.layers == "scan"`, are one module `blocks` whose parameters have a leading axis of layers.
    """

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> Hidden:
        """The hidden states of packed rows. Positions restart with every document (segment), and no information crosses
        from one segment to another. Segment 0 is padding. Without a key there is no dropout.
        """
        ...

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The hidden states of T tokens that continue the tokens in `cache`, and the extended cache.

        Needs the unrolled layout. Tokens of segment 0 have no effect on later tokens.
        """
        ...

    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix whose rows score the vocabulary."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. Names of parameters are paths in the unrolled layout, such as `blocks/0/mlp/up/kernel`."""

    module: Callable[..., Module]  # (model, compute, *, rngs) -> the module, initialised from `rngs.params()`
    init_cache: Callable[[Any, ComputeConfig, int, int], Cache]  # (model, compute, rows, positions) -> an empty cache
    # (pattern of parameter names, how these are split). The first match applies; every name must match a pattern.
    sharding: Sequence[tuple[str, PartitionSpec]]
    muon: str  # pattern of the names of parameters that Muon optimises: the matrices of hidden layers
    flops_per_token: Callable[[Any, int], float]  # (model, row length) -> FLOPs of a training step per token
    # (model, row length) -> (length of the rows that attention sees, query heads per key-value head, head size), to
    # choose a kernel; None: there is no attention.
    attention_shape: Callable[[Any, int], tuple[int, int, int] | None]
    published: Published | str  # the published format; or a sentence that says why models cannot be exported
    # Names of `Hidden.losses` and `Hidden.observed`; training steps and evaluations log them.
    logged: Callable[[Any], tuple[str, ...]] = lambda model: ()
    # (model, row length) -> (length of the rows, channels) of each recurrence, to choose kernels.
    recurrence_shapes: Callable[[Any, int], Sequence[tuple[int, int]]] = lambda model, length: ()
    # (module, tokens, positions, segment ids) -> where chunks begin, for a family that divides a row into chunks: for
    # each stage, outermost first, whether one begins at a token (bool), and the probability of it, both [B, T].
    boundaries: Callable[[Any, Array, Array, Array], Sequence[tuple[Array, Array]]] | None = None
    # The learning rate of parameters is multiplied by that of the first name pattern that matches, or else by 1.
    rates: Callable[[Any], Sequence[tuple[str, float]]] = lambda model: ()
    # (unrolled parameters, compute) -> those that the module computes the same with, but which take less work.
    for_generation: Callable[[Any, ComputeConfig], Any] = lambda params, compute: params


def with_own_losses(
    loss: Array, weight: Array, sums: dict[str, Array], hidden: Hidden
) -> tuple[Array, dict[str, Array]]:
    """Adds the model's own losses to the `loss` and the `sums` of a stage, and what it observed to the `sums`.

    `loss` is a sum over tokens whose weights add up to `weight`. The mean of each of the model's losses is multiplied
    by `weight`, so that it counts as much as the mean of the stage's loss.
    """

    def scaled(named: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
        return {name: total / jnp.maximum(own, 1.0) * weight for name, (total, own) in named.items()}

    losses = scaled(hidden.losses)
    return sum(losses.values(), start=loss), {**sums, **losses, **scaled(hidden.observed)}
