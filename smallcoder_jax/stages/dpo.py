"""Direct preference optimisation: the better answer of a pair is made more likely than it was at the start, compared
with the worse one.

Shapes: R pairs, 2 the chosen and the rejected answer, B answers, T places, P all pairs of a side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data.preference_rows import fill_pairs
from smallcoder_jax.data.progress import Progress
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder import Decoder
from smallcoder_jax.ops.cross_entropy import token_losses
from smallcoder_jax.stages import pairs as preference_pairs
from smallcoder_jax.stages.start import load_start, need_start
from smallcoder_jax.train.loop import Task
from smallcoder_jax.train.step import Batch, LossFn


def make_loss(config: Config, criteria: Sequence[str]) -> LossFn:
    """`losses.direct_preference`; the log-probabilities at the start are in the batch, as `reference` [R, 2]."""
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> preference_pairs.Judged:
        logs_R2, reference_R2 = answer_log_probs(build.bind(graph, params), batch, key), batch["reference"]

        def loss_of(weights_R: Array) -> preference_pairs.Judged:
            return losses.direct_preference(
                logs_R2[:, 0],
                logs_R2[:, 1],
                reference_R2[:, 0],
                reference_R2[:, 1],
                weights_R,
                beta=config.dpo.beta,
            )

        return preference_pairs.judge(loss_of, batch, criteria)

    return loss_fn


def answer_log_probs(decoder: Decoder, batch: Batch, key: Array | None) -> Array:
    """Log-probabilities [R, 2] of whole answers, the tokens that end them included, in nats."""
    hidden_BTD = preference_pairs.hidden_states(decoder, batch, key)
    targets_BT = preference_pairs.answers(batch["targets"])
    nll_X = token_losses(flat_tokens(hidden_BTD), decoder.unembedding(), flat_tokens(targets_BT)).nll_X
    return -jnp.sum(nll_X.reshape(batch["targets"].shape) * batch["loss_weights"], axis=-1)


def reference_log_probs(config: Config, loaded: LoadedModel, pairs: preference_pairs.Pairs) -> preference_pairs.Columns:
    """By side: `answer_log_probs` [P, 2] of all pairs under the model that a run begins with."""
    compute = dataclasses.replace(config.compute, layers="unroll", remat="none")
    graph, _ = build.abstract_model(config.model, compute)
    log_probs = jax.jit(lambda params, batch: answer_log_probs(build.bind(graph, params), batch, None))
    rows, length = eval_rows(config), config.train.sequence_length
    found: dict[str, dict[str, np.ndarray]] = {}
    for side, own in pairs.sides.items():
        parts = []
        for start in range(0, len(own), rows):
            batch = fill_pairs(own[start : start + rows], rows, length, loaded.tokenizer.pad_id)
            parts.append(jax.device_get(log_probs(loaded.params, batch)))
        found[side] = {"reference": np.concatenate(parts)[: len(own)]}
    return found


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """Raises UserError where there is no model to begin with, or no pairs."""
    loaded = need_start(config, loaded)
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    progress.note("log-probabilities of all answers at the start")
    columns = reference_log_probs(config, loaded, pairs)
    loss_fn = make_loss(config, pairs.criteria)
    return preference_pairs.make_task(config, loaded, pairs, loss_fn, columns, {"beta": config.dpo.beta})


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, float]:
    """Loss, accuracy and margin on all held-out pairs, beside the model that `stage.start` names."""
    before = need_start(config, load_start(config))
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    columns = reference_log_probs(config, before, pairs)
    config = dataclasses.replace(config, model=loaded.model, compute=loaded.compute)
    loss_fn = make_loss(config, pairs.criteria)
    return preference_pairs.measure(config, pairs, loss_fn, loaded.params, columns, loaded.tokenizer)
