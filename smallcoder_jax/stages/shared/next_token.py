"""The loss of all stages that learn to predict the next token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.config import Config
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.family import with_own_losses
from smallcoder_jax.train.step import Batch, LossFn


def make_loss(config: Config) -> LossFn:
    """The language-model loss of a packed batch (`losses.language_model`) plus the model's own losses. The sums include
    the batch's `bytes`, if it has them.
    """
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        model = build.bind(graph, build.model_params(params))
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"], key)
        loss, weight, sums = losses.language_model(
            flat_tokens(hidden.states_BTD),
            model.unembedding(),
            flat_tokens(batch["targets"]),
            flat_tokens(batch["loss_weights"]),
            config.train.z_loss,
        )
        loss, sums = with_own_losses(loss, weight, with_bytes(sums, batch), hidden)
        return loss, weight, sums

    return loss_fn


def with_bytes(sums: dict[str, Array], batch: Batch) -> dict[str, Array]:
    """The sums, with the UTF-8 `bytes` of the counted text if the batch has them (validation batches of documents)."""
    return {**sums, "bytes": jnp.sum(batch["bytes"])} if "bytes" in batch else sums
