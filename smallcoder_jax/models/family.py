"""What a family of models is to the rest of the package, which asks it here and knows no model by name.

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

Cache = Any  # of a family: a pytree whose arrays have rows as their first axis; scalars are the same for all rows


class Hidden(NamedTuple):
    """What a model makes of tokens: normed hidden states, from which logits and scores are made, and losses of its own
    by name, each a sum with its weight; what is added to the loss of a stage is their quotient, per token."""

    states_BTD: Array
    losses: Mapping[str, tuple[Array, Array]] = {}


class Module(Protocol):
    """An `nnx.Module` of a family. Its parameters are float32, and layers that are alike are in a list `blocks`, or,
    with `compute.layers == "scan"`, one module `blocks` whose parameters have a leading axis."""

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> Hidden:
        """Packed rows: positions restart and nothing crosses from one document (segment) to another; segment 0 is
        padding. Without a key there is no dropout."""
        ...

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `__call__` for T tokens that follow what `cache` holds, in the unrolled layout: the hidden states and the
        cache that goes on. A token of segment 0 leaves no trace in it."""
        ...

    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix whose rows score the vocabulary."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. Names of parameters are paths in the unrolled layout, such as `blocks/0/mlp/up/kernel`."""

    module: Callable[..., Module]  # (model, compute, *, rngs): reproducible from `rngs.params()`
    init_cache: Callable[[Any, ComputeConfig, int, int], Cache]  # (model, compute, rows, positions), empty
    sharding: Sequence[
        tuple[str, PartitionSpec]
    ]  # name pattern -> split; the first match holds, and every name has one
    muon: str  # pattern of the names whose parameters Muon takes; it is for matrices of hidden layers
    flops_per_token: Callable[[Any, int], float]  # (model, row length) of a training step
    # (query heads per key-value head, head size) for the choice of a kernel; None: it has no attention.
    attention_shape: Callable[[Any], tuple[int, int]] | None
    published: Published | str  # how others know it; or, in a sentence, why it cannot be exported
    losses: tuple[str, ...] = ()  # names of `Hidden.losses`, which steps log


def with_own_losses(
    loss: Array, weight: Array, sums: dict[str, Array], hidden: Hidden
) -> tuple[Array, dict[str, Array]]:
    """The loss of a stage, a sum over `weight`, with the model's own, and its sums with theirs.

    The mean of each of the model's losses counts as much as the stage's own: its quotient, times `weight`.
    """
    for name, (total, own) in hidden.losses.items():
        scaled = total / jnp.maximum(own, 1.0) * weight
        loss, sums = loss + scaled, {**sums, name: scaled}
    return loss, sums
