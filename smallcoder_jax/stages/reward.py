"""A reward model: a model with a scalar head, trained so that the chosen answer of a pair gets the higher score.

Shapes: R rows, 2 the chosen and the rejected answers, B = 2 R, S slots for pairs, X = R S pairs, T positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import scores_at
from smallcoder_jax.stages.shared import pairs as preference_pairs
from smallcoder_jax.stages.shared.start import need_start
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.task import Task


def make_loss(config: Config, criteria: Sequence[str]) -> LossFn:
    """`losses.bradley_terry` of the scores at the last token of each answer."""
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> preference_pairs.Judged:
        hidden = preference_pairs.hidden_states(build.bind(graph, build.model_params(params)), batch, key)
        scores_BS = scores_at(params["head"], hidden.states_BTD, preference_pairs.answers(batch["ends"]))
        chosen_X, rejected_X = preference_pairs.by_pair(scores_BS)
        return preference_pairs.judge(
            lambda weights_X: losses.bradley_terry(chosen_X, rejected_X, weights_X), batch, criteria, hidden
        )

    return loss_fn


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """The task. Raises UserError when there is no start model, or there are no pairs."""
    loaded = need_start(config, loaded)
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    return preference_pairs.make_task(config, loaded, pairs, make_loss(config, pairs.criteria), {}, {})


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, float]:
    """Loss, accuracy and margin on all held-out pairs. Raises UserError for a model without a head."""
    if loaded.head is None:
        raise UserError(f"{loaded.origin['path']} has no head for rewards; give a run of stage reward")
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    config = dataclasses.replace(config, model=loaded.model, compute=loaded.compute)
    params = {"model": loaded.params, "head": loaded.head}
    return preference_pairs.measure(config, pairs, make_loss(config, pairs.criteria), params, {}, loaded.tokenizer)
