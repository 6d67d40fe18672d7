"""PPO (arXiv 1707.06347) with a separate critic, and a penalty on the divergence from the start model.

Shapes: B rows, T positions of a row, X = B T tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from smallcoder_jax import loading, losses
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.family import with_own_losses
from smallcoder_jax.ops.entropy import entropies
from smallcoder_jax.rl.experience import ppo_rows
from smallcoder_jax.rl.rollouts import critic_values, policy_pass
from smallcoder_jax.stages.shared import policy
from smallcoder_jax.stages.shared.start import check_shape, need_start
from smallcoder_jax.train.state import first_head
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.task import Start, Task

REPORTED = ("ratio", "clipped", "kl", "value_loss", "entropy")


def make_loss(config: Config) -> LossFn:
    """The clipped surrogate, the clipped value loss and the entropy bonus, per token."""
    graph, rl = build.abstract_model(config.model, config.compute)[0], config.rl

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        weights_X = flat_tokens(batch["loss_weights"])
        made = policy_pass(graph, params, batch, rl.temperature)
        surrogate, weight, sums = losses.clipped_policy(
            made.log_probs_X,
            flat_tokens(batch["log_probs"]),
            flat_tokens(batch["advantages"]),
            weights_X,
            clip=rl.clip,
        )
        values_X = flat_tokens(critic_values(graph, params["critic"], batch))
        old_X, returns_X = flat_tokens(batch["values"]), flat_tokens(batch["returns"])
        value, _ = losses.clipped_value(values_X, old_X, returns_X, weights_X, clip=rl.value_clip)
        entropy = jnp.sum(entropies(made.scaled_XD, made.unembed_VD) * weights_X)
        loss = surrogate + rl.value_weight * value - rl.entropy_weight * entropy
        sums |= {"value_loss": value, "entropy": entropy, **policy.iteration_sums(batch, weight)}
        loss, sums = with_own_losses(loss, weight, sums, made.hidden)
        return loss, weight, sums

    return loss_fn


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """See `policy.make_task`."""
    del progress  # preparing prompts takes only seconds
    loaded = need_start(config, loaded)
    task = policy.make_task(config, loaded, loss_fn=make_loss(config), learn=ppo_rows, reported=REPORTED)
    start = Start({"model": loaded.params, "critic": first_critic(config, loaded)}, loaded.origin)
    return dataclasses.replace(task, start=start)


def first_critic(config: Config, loaded: LoadedModel) -> build.Params:
    """The initial critic: a model with a head, unrolled.

    It is the reward model, which can already predict the reward of an answer (as in Ouyang et al., arXiv 2203.02155).
    When answers are checked instead, it is the start model of the policy with a fresh head. Raises UserError when the
    reward model has another shape than the policy.
    """
    if not config.rl.reward_model:
        return {"model": loaded.params, "head": first_head(config)}
    judge = loading.load(Path(config.rl.reward_model))
    check_shape(config.rl.reward_model, judge.model, config.model)
    return {"model": judge.params, "head": judge.head}


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    """See `policy.measure`."""
    del progress
    return policy.measure(config, loaded)
