"""Pretraining: next-token prediction on packed documents of prose or code, from scratch or from another run's model."""

from __future__ import annotations

from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.stages.shared import documents, next_token
from smallcoder_jax.stages.shared.start import check_tokenizer, start_of
from smallcoder_jax.train.task import Task


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """The task. Raises UserError when the data cannot be obtained, or its tokenizer is not the start model's."""
    prepared = documents.prepare_on_all(config, progress)
    if loaded is not None:
        check_tokenizer(loaded, prepared.tokenizer)
    return documents.make_task(config, prepared, start_of(loaded), next_token.make_loss(config))


measure = documents.measure
