"""Distillation: next-token prediction on documents, and beside it a teacher's distribution over the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax import Array

from smallcoder_jax import loading, losses
from smallcoder_jax.config import ComputeConfig, Config, ModelConfig
from smallcoder_jax.data.progress import Progress
from smallcoder_jax.errors import UserError
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.stages import documents, language
from smallcoder_jax.stages.start import check_tokenizer, start_of
from smallcoder_jax.train.metrics import language_summary, ratio
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.task import Task


def make_loss(config: Config, teacher: ModelConfig, teacher_compute: ComputeConfig) -> LossFn:
    """`losses.distillation` of a packed batch; the teacher's parameters are `params["teacher"]`."""
    graph, _ = build.abstract_model(config.model, config.compute)
    teacher_graph, _ = build.abstract_model(teacher, teacher_compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        student = build.bind(graph, params)
        guide = build.bind(teacher_graph, jax.lax.stop_gradient(params["teacher"]))
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        loss, weight, sums = losses.distillation(
            flat_tokens(student(*inputs, key)),
            student.unembedding(),
            flat_tokens(guide(*inputs)),
            guide.unembedding(),
            flat_tokens(batch["targets"]),
            flat_tokens(batch["loss_weights"]),
            alpha=config.distill.alpha,
            temperature=config.distill.temperature,
        )
        return loss, weight, language.with_bytes(sums, batch)

    return loss_fn


def summary(sums: dict[str, float]) -> dict[str, float]:
    """That of a language model, and the divergence from the teacher in nats per token."""
    return {**language_summary(sums), "kl": ratio(sums["kl"], sums["weight"])}


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """Raises UserError where there is no teacher, or it has another tokenizer than the data."""
    if not config.distill.teacher:
        raise UserError("stage.name=distill needs --config.distill.teacher: the folder of a run or of an export")
    teacher = loading.load(Path(config.distill.teacher))
    if config.train.sequence_length > teacher.model.context:
        raise UserError(
            f"{config.train.sequence_length=} is longer than the context of the teacher in {config.distill.teacher}, "
            f"{teacher.model.context}"
        )
    prepared = documents.prepare_on_all(config, progress)
    for model in (teacher, *([loaded] if loaded else [])):
        check_tokenizer(model, prepared.tokenizer)
    task = documents.make_task(
        config,
        prepared,
        start_of(loaded),
        make_loss(config, teacher.model, teacher.compute),
        reported=("accuracy", "kl"),
        frozen={"teacher": teacher.params},
        identity={
            "teacher": teacher.origin["hash"],
            "alpha": config.distill.alpha,
            "temperature": config.distill.temperature,
        },
        summarise=summary,
    )
    task.facts["teacher"] = f"{config.distill.teacher}, step {teacher.origin['step']}"
    return task


measure = documents.measure
