"""Pretraining: next-token prediction on packed documents."""

from __future__ import annotations

from typing import Any

from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.config import Config
from smallcoder_jax.models import build
from smallcoder_jax.train.step import Batch, LossFn


def make_loss(config: Config) -> LossFn:
    """The language-model loss of a packed batch (see `losses.language_model`)."""
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        decoder = build.bind(graph, params)
        hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"], key)
        return losses.language_model(
            hidden_BTD.reshape(-1, config.model.width),
            decoder.unembedding(),
            batch["targets"].reshape(-1),
            batch["loss_weights"].reshape(-1),
            config.train.z_loss,
        )

    return loss_fn
