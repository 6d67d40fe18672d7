"""Direct preference optimisation (DPO): relative to the start model, the policy learns to prefer the chosen answer of a
pair to the rejected one.

Shapes: R rows, 2 the chosen and the rejected answers, B = 2 R, S slots for pairs, X = R S pairs, T positions, P all
pairs of a side.
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
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.family import Hidden, Module
from smallcoder_jax.ops import precision
from smallcoder_jax.ops.cross_entropy import token_losses
from smallcoder_jax.stages.shared import pairs as preference_pairs
from smallcoder_jax.stages.shared.start import load_start, need_start
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.task import Task


def make_loss(config: Config, criteria: Sequence[str]) -> LossFn:
    """`losses.direct_preference`. The start model's log-probabilities are in the batch as `reference` [R, S, 2]."""
    graph, _ = build.abstract_model(config.model, config.compute)

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> preference_pairs.Judged:
        model = build.bind(graph, build.model_params(params))
        hidden = preference_pairs.hidden_states(model, batch, key)
        chosen_X, rejected_X = preference_pairs.by_pair(answer_log_probs(model, hidden, batch))
        reference_X2 = batch["reference"].reshape(-1, 2)

        def loss_of(weights_X: Array) -> preference_pairs.Judged:
            return losses.direct_preference(
                chosen_X, rejected_X, reference_X2[:, 0], reference_X2[:, 1], weights_X, beta=config.dpo.beta
            )

        return preference_pairs.judge(loss_of, batch, criteria, hidden)

    return loss_fn


def answer_log_probs(model: Module, hidden: Hidden, batch: Batch) -> Array:
    """Log-probabilities [B, S] of whole answers, including their end tokens, in nats; 0 for empty slots.

    `hidden` is the result of `preference_pairs.hidden_states`.
    """
    targets_BT, segment_ids_BT, weights_BT = (
        preference_pairs.answers(batch[name]) for name in ("targets", "segment_ids", "loss_weights")
    )
    nll_X = token_losses(flat_tokens(hidden.states_BTD), model.unembedding(), flat_tokens(targets_BT)).nll_X
    slots_S = jnp.arange(1, batch["ends"].shape[-1] + 1, dtype=jnp.int32)
    own_BTS = segment_ids_BT[..., None] == slots_S
    return -jnp.sum(jnp.where(own_BTS, (nll_X.reshape(targets_BT.shape) * weights_BT)[..., None], 0.0), axis=1)


def reference_log_probs(config: Config, loaded: LoadedModel, pairs: preference_pairs.Pairs) -> preference_pairs.Columns:
    """By side of the split, the log-probabilities [P, 2] of the answers of all pairs under the start model."""
    compute = dataclasses.replace(config.compute, layers="unroll", remat="none")
    graph, _ = build.abstract_model(config.model, compute)

    def by_pair(params: build.Params, batch: Batch) -> tuple[Array, Array]:
        model = build.bind(graph, params)
        return preference_pairs.by_pair(
            answer_log_probs(model, preference_pairs.hidden_states(model, batch, None), batch)
        )

    # The same precision as in training steps, so that a run starts with a margin of 0.
    matmul = precision.choose(config.compute, jax.default_backend())
    log_probs = jax.jit(precision.multiplying(matmul.kind, by_pair))
    rows = eval_rows(config)
    order = {"rows": range(rows), "seed": 0, "num_epochs": 1}
    found: dict[str, dict[str, np.ndarray]] = {}
    for side, own in pairs.sides.items():
        numbers = {side: {"number": np.arange(len(own))[:, None]}}
        of_pairs = np.zeros((len(own), 2), np.float32)
        for batch in preference_pairs.batches_of(config, pairs, side, numbers, loaded.tokenizer, rows, **order):
            filled, number = batch["pair_weights"].reshape(-1) > 0, batch.pop("number").reshape(-1)
            of_pairs[number[filled]] = np.stack(jax.device_get(log_probs(loaded.params, batch)), axis=1)[filled]
        found[side] = {"reference": of_pairs}
    return found


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """The task. Raises UserError when there is no start model, or there are no pairs."""
    loaded = need_start(config, loaded)
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    progress.note("log-probabilities of all answers at the start")
    columns = reference_log_probs(config, loaded, pairs)
    loss_fn = make_loss(config, pairs.criteria)
    task = preference_pairs.make_task(config, loaded, pairs, loss_fn, columns, {"beta": config.dpo.beta})
    return dataclasses.replace(task, reported=(*task.reported, *preference_pairs.APART))


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, float]:
    """`preference_pairs.summary` of all held-out pairs. The reference is the model that `stage.start` names."""
    before = need_start(config, load_start(config))
    pairs = preference_pairs.prepare(config, loaded.tokenizer, progress)
    columns = reference_log_probs(config, before, pairs)
    config = dataclasses.replace(config, model=loaded.model, compute=loaded.compute)
    loss_fn = make_loss(config, pairs.criteria)
    return preference_pairs.measure(config, pairs, loss_fn, {"model": loaded.params}, columns, loaded.tokenizer)
