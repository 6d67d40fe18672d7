"""GRPO (arXiv 2402.03300): each answer is compared with the other answers to its question. There is no critic.

Shapes: B rows, T positions of a row, X = B T tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.family import with_own_losses
from smallcoder_jax.rl.experience import grpo_rows
from smallcoder_jax.rl.rollouts import policy_pass
from smallcoder_jax.stages.shared import policy
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.task import Task

REPORTED = ("ratio", "clipped", "kl", "alike_groups")


def make_loss(config: Config) -> LossFn:
    """The clipped surrogate plus the divergence from the start model, both means over an answer's tokens (eq. 3)."""
    graph, rl = build.abstract_model(config.model, config.compute)[0], config.rl

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        written_BT = batch["loss_weights"]
        lengths_B1 = jnp.maximum(written_BT.sum(axis=1, keepdims=True), 1.0)
        # Multiplied by the iteration's mean length, so that weights add up to tokens, as in all stages.
        weights_X = flat_tokens(written_BT * (batch["answer_tokens"] / lengths_B1))
        advantages_X = flat_tokens(jnp.broadcast_to(batch["advantages"], written_BT.shape))
        made = policy_pass(graph, params, batch, rl.temperature)
        surrogate, weight, sums = losses.clipped_policy(
            made.log_probs_X, flat_tokens(batch["log_probs"]), advantages_X, weights_X, clip=rl.clip
        )
        divergence, _ = losses.reference_divergence(made.log_probs_X, flat_tokens(batch["reference"]), weights_X)
        loss = surrogate + jnp.mean(batch["kl_coefficient"]) * divergence
        sums |= {"alike_groups": jnp.mean(batch["alike_groups"]) * weight, **policy.iteration_sums(batch, weight)}
        loss, sums = with_own_losses(loss, weight, sums, made.hidden)
        return loss, weight, sums

    return loss_fn


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """See `policy.make_task`."""
    del progress  # preparing prompts takes only seconds
    return policy.make_task(config, loaded, loss_fn=make_loss(config), learn=grpo_rows, reported=REPORTED)


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    """See `policy.measure`."""
    del progress
    return policy.measure(config, loaded)
