"""Pretraining: next-token prediction on packed documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data import pipeline
from smallcoder_jax.data.prepare import Prepared
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.train.loop import Task
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.terminal import human_count


def make_loss(config: Config) -> LossFn:
    """The language-model loss of a packed batch (see `losses.language_model`)."""
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        decoder = build.bind(graph, params)
        hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"], key)
        return losses.language_model(
            flat_tokens(hidden_BTD),
            decoder.unembedding(),
            flat_tokens(batch["targets"]),
            flat_tokens(batch["loss_weights"]),
            config.train.z_loss,
        )

    return loss_fn


def make_task(config: Config, prepared: Prepared, references: dict[str, float]) -> Task:
    """Packed documents of `prepared` with the language-model loss, for the loop."""
    train, data = config.train, config.data

    def train_batches(rows: Sequence[int]) -> Any:
        return pipeline.make_train_iterator(
            prepared.manifest,
            prepared.tokens_folder,
            prepared.tokenizer,
            data=data,
            sequence_length=train.sequence_length,
            batch_size=train.batch_size,
            rows=rows,
            seed=train.seed,
        )

    def validation_batches(limit: int, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.validation_batches(
            prepared.manifest,
            prepared.tokens_folder,
            prepared.tokenizer,
            sequence_length=train.sequence_length,
            batch_size=eval_rows(config),
            rows=rows,
            limit_batches=limit,
        )

    train_tokens = sum(source.train.tokens for source in prepared.manifest.sources)
    validation_tokens = sum(source.validation.tokens for source in prepared.manifest.sources)
    planned = train.steps * train.batch_size * train.sequence_length
    return Task(
        loss_fn=make_loss(config),
        train_batches=train_batches,
        validation_batches=validation_batches,
        identity=pipeline.pipeline_identity(
            prepared.manifest,
            data,
            sequence_length=train.sequence_length,
            batch_size=train.batch_size,
            seed=train.seed,
        ),
        tokenizer=prepared.tokenizer,
        tokenizer_folder=prepared.tokenizer_folder,
        dataset=data.sources,
        dummy_data=prepared.manifest.dummy,
        facts={
            "sources": data.sources + (" DUMMY DATA" if prepared.manifest.dummy else ""),
            "tokens": f"{human_count(train_tokens)} to train on, {human_count(validation_tokens)} held out; "
            f"{planned / max(train_tokens, 1):.2f} epochs planned",
            "rows": f"packing {data.packing}, FIM rate {data.fim_rate}, {data.workers} workers",
        },
        references=references,
    )
