"""Distillation: next-token prediction on documents, combined with matching a teacher's distribution over the
vocabulary.

The teacher runs alongside the student, or its most probable tokens are computed beforehand (`shared.teacher_tokens`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from smallcoder_jax import loading, losses
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import ComputeConfig, Config, ModelConfig, eval_rows
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.family import with_own_losses
from smallcoder_jax.ops.divergence import divergences, top_divergences
from smallcoder_jax.stages.shared import documents, next_token
from smallcoder_jax.stages.shared.start import check_tokenizer, one_process, start_of
from smallcoder_jax.stages.shared.teacher_tokens import KeptTokens, WithTeacher, folder_of, scorer
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.sums import language_summary, ratio
from smallcoder_jax.train.task import Task


def make_loss(config: Config, teacher: ModelConfig, teacher_compute: ComputeConfig) -> LossFn:
    """`losses.distillation` of a packed batch.

    The teacher's parameters are `params["teacher"]`. With `distill.top_k`, its most probable tokens are in the batch
    instead, as `teacher_ids` and `teacher_log_probs` [B, T, K].
    """
    distill = config.distill
    graph, _ = build.abstract_model(config.model, config.compute)
    teacher_graph, _ = build.abstract_model(teacher, teacher_compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        student = build.bind(graph, build.model_params(params))
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        hidden = student(*inputs, key)
        hidden_XD, unembed_VD = flat_tokens(hidden.states_BTD), student.unembedding()
        if distill.top_k:
            of_teacher = flat_tokens(batch["teacher_ids"]), flat_tokens(batch["teacher_log_probs"])
            kl_X = top_divergences(hidden_XD, unembed_VD, *of_teacher, distill.temperature)
        else:
            guide = build.bind(teacher_graph, jax.lax.stop_gradient(params["teacher"]))
            of_teacher = flat_tokens(guide(*inputs).states_BTD), guide.unembedding()
            kl_X = divergences(hidden_XD, unembed_VD, *of_teacher, distill.temperature)
        loss, weight, sums = losses.distillation(
            hidden_XD,
            unembed_VD,
            kl_X,
            flat_tokens(batch["targets"]),
            flat_tokens(batch["loss_weights"]),
            alpha=distill.alpha,
            temperature=distill.temperature,
        )
        loss, sums = with_own_losses(loss, weight, next_token.with_bytes(sums, batch), hidden)
        return loss, weight, sums

    return loss_fn


def summary(sums: dict[str, float]) -> dict[str, float]:
    """The summary of a language model, and the divergence from the teacher in nats per token."""
    return {**language_summary(sums), "kl": ratio(sums["kl"], sums["weight"])}


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """The task. Raises UserError when no teacher is named, or when the teacher does not fit the data, the row length or
    the vocabulary.
    """
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
    # With the same tokenizer, the embeddings may still have different numbers of spare rows.
    if teacher.model.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the teacher in {config.distill.teacher} has a table of {teacher.model.vocab_size} rows, but "
            f"{config.model.vocab_size=}; they are compared row by row: set model.vocab_size={teacher.model.vocab_size}"
        )
    distill = config.distill
    task = documents.make_task(
        config,
        prepared,
        start_of(loaded),
        make_loss(config, teacher.model, teacher.compute),
        reported=("accuracy", "kl"),
        frozen={} if distill.top_k else {"teacher": teacher.params},
        frozen_model=teacher.model,
        identity={
            "teacher": teacher.origin["hash"],
            "alpha": distill.alpha,
            "temperature": distill.temperature,
            "top_k": distill.top_k,
        },
        summarise=summary,
    )
    task.facts["teacher"] = f"{distill.teacher}, step {teacher.origin['step']}"
    return _with_kept_tokens(config, teacher, task, progress) if distill.top_k else task


def _with_kept_tokens(config: Config, teacher: LoadedModel, task: Task, progress: Progress) -> Task:
    """The task with the teacher's most probable tokens in its batches. Tokens that are not on disk are computed now."""
    one_process(config)
    train, limit, held_out = config.train, config.eval.batches, range(eval_rows(config))
    shape = {"length": train.sequence_length, "count": config.distill.top_k}
    # The teacher's tokens do not depend on alpha, the weight that the student gives them.
    folder = folder_of(config, {name: value for name, value in task.identity.items() if name != "alpha"})
    score = scorer(config, teacher)
    of_train = KeptTokens(folder / "train", rows=train.batch_size, **shape)
    of_validation = KeptTokens(folder / f"validation-{len(held_out)}", rows=len(held_out), **shape)
    batches = task.train_batches(range(train.batch_size))
    try:
        of_train.make((next(batches) for _ in range(train.steps)), score, progress)
    finally:
        batches.close()
    of_validation.make(task.validation_batches(limit, held_out), score, progress)

    def validation_batches(limit: int, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        kept = of_validation.read()
        for batch in task.validation_batches(limit, rows):
            yield {**batch, **next(kept)}

    task.facts["teacher"] += f"; its {config.distill.top_k} most probable tokens, kept in {folder}"
    return dataclasses.replace(
        task,
        train_batches=lambda rows: WithTeacher(task.train_batches(rows), of_train),
        validation_batches=validation_batches,
    )


measure = documents.measure
