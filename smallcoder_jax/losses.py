"""Losses as sums over tokens, pairs or sequences, so that gradient accumulation and data parallelism are exact.

Shapes: X tokens (B times T), D width, V vocabulary; B sequences of T tokens; R pairs of a chosen and a rejected answer;
B prompts with G answers each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from smallcoder_jax.ops.cross_entropy import token_losses


def language_model(
    hidden_XD: Float[Array, "X D"],
    unembed_VD: Float[Array, "V D"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"],
    z_loss: float,
) -> tuple[Array, Array, dict[str, Array]]:
    """Weighted cross-entropy: (loss_sum, weight_sum, sums), float32 scalars.

    loss_sum = sum w (nll + z_loss log_z^2) (z-loss: PaLM, arXiv 2204.02311, section 5). `sums`, weighted
    by w: `nats`, `accuracy` (the target scores highest) and `top5_accuracy`.
    """
    losses = token_losses(hidden_XD, unembed_VD, targets_X)
    nll_sum = jnp.sum(losses.nll_X * weights_X)
    loss_sum = nll_sum
    if z_loss:
        loss_sum = loss_sum + z_loss * jnp.sum(jnp.square(losses.log_z_X) * weights_X)

    def weigh(right_X: Array) -> Array:
        return jnp.sum(jnp.where(right_X, weights_X, 0.0))

    sums = {"nats": nll_sum, "accuracy": weigh(losses.best_X), "top5_accuracy": weigh(losses.rank_X < 5)}
    return loss_sum, jnp.sum(weights_X), sums


def distillation(
    hidden_XD: Float[Array, "X D"],
    unembed_VD: Float[Array, "V D"],
    kl_X: Float[Array, " X"],
    targets_X: Int[Array, " X"],
    weights_X: Float[Array, " X"],
    *,
    alpha: float,
    temperature: float,
) -> tuple[Array, Array, dict[str, Array]]:
    """alpha CE + (1 - alpha) T^2 KL(teacher || student at temperature T), weighted per token (Hinton et al., arXiv
    1503.02531): (loss_sum, weight_sum, sums), where `sums` has `kl` in addition to the sums of `language_model`. `kl_X`
    comes from `ops.divergence`.
    """
    nats, weight, sums = language_model(hidden_XD, unembed_VD, targets_X, weights_X, 0.0)
    kl = jnp.sum(kl_X * weights_X)
    return alpha * nats + (1.0 - alpha) * temperature**2 * kl, weight, {**sums, "kl": kl}


def bradley_terry(
    chosen_R: Float[Array, " R"], rejected_R: Float[Array, " R"], weights_R: Float[Array, " R"]
) -> tuple[Array, Array, dict[str, Array]]:
    """-log sigmoid(chosen - rejected) of the rewards of pairs (arXiv 2203.02155, eq. 1): (loss_sum, weight_sum, sums).
    `sums`: `accuracy` (the chosen answer has the higher reward) and `margin` (the difference of the rewards).
    """
    margin_R = chosen_R - rejected_R
    sums = {"accuracy": jnp.sum(jnp.where(margin_R > 0, weights_R, 0.0)), "margin": jnp.sum(margin_R * weights_R)}
    return -jnp.sum(jax.nn.log_sigmoid(margin_R) * weights_R), jnp.sum(weights_R), sums


def direct_preference(
    chosen_R: Float[Array, " R"],
    rejected_R: Float[Array, " R"],
    reference_chosen_R: Float[Array, " R"],
    reference_rejected_R: Float[Array, " R"],
    weights_R: Float[Array, " R"],
    *,
    beta: float,
) -> tuple[Array, Array, dict[str, Array]]:
    """DPO (arXiv 2305.18290, eq. 7) from the log-probabilities of whole answers under the model and under the
    reference, the model that it started from. Returns what `bradley_terry` returns for the implicit rewards beta (log p
    - log p_reference). `sums` also has `*_log_prob` and `*_reward` of either answer, because the margin alone does not
    show whether both answers become less probable.
    """
    chosen_reward_R, rejected_reward_R = (
        beta * (chosen_R - reference_chosen_R),
        beta * (rejected_R - reference_rejected_R),
    )
    loss, weight, sums = bradley_terry(chosen_reward_R, rejected_reward_R, weights_R)
    apart = {
        "chosen_log_prob": chosen_R,
        "rejected_log_prob": rejected_R,
        "chosen_reward": chosen_reward_R,
        "rejected_reward": rejected_reward_R,
    }
    return loss, weight, {**sums, **{name: jnp.sum(value_R * weights_R) for name, value_R in apart.items()}}


def generalized_advantages(
    rewards_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    real_BT: Bool[Array, "B T"],
    *,
    gamma: float,
    decay: float,
) -> tuple[Array, Array]:
    """GAE (arXiv 1506.02438, eq. 16, with lambda = `decay`): the advantages, and the returns that values are fitted to.

    The real tokens of a row are contiguous, and the episode ends after the last of them. Elsewhere both results are 0.
    """
    next_BT = jnp.pad(jnp.where(real_BT, values_BT, 0.0)[:, 1:], ((0, 0), (0, 1)))
    errors_BT = jnp.where(real_BT, rewards_BT + gamma * next_BT - values_BT, 0.0)

    def back(following_B: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        error_B, real_B = column
        advantage_B = jnp.where(real_B, error_B + gamma * decay * following_B, 0.0)
        return advantage_B, advantage_B

    nothing_B = jnp.zeros(rewards_BT.shape[:1], errors_BT.dtype)
    advantages_TB = jax.lax.scan(back, nothing_B, (errors_BT.T, real_BT.T), reverse=True)[1]
    return advantages_TB.T, jnp.where(real_BT, advantages_TB.T + values_BT, 0.0)


def clipped_policy(
    log_probs_X: Float[Array, " X"],
    old_log_probs_X: Float[Array, " X"],
    advantages_X: Float[Array, " X"],
    weights_X: Float[Array, " X"],
    *,
    clip: float,
) -> tuple[Array, Array, dict[str, Array]]:
    """PPO's clipped surrogate as a loss to minimise (arXiv 1707.06347, eq. 7): (loss_sum, weight_sum, sums). `sums`:
    `ratio`, `clipped` (the ratio is outside 1 +- clip) and `kl`, an estimate of KL(old || new) that is never negative.
    """
    log_ratio_X = log_probs_X - old_log_probs_X
    ratio_X = jnp.exp(log_ratio_X)
    held_X = jnp.clip(ratio_X, 1.0 - clip, 1.0 + clip)
    loss_X = -jnp.minimum(ratio_X * advantages_X, held_X * advantages_X)
    sums = {
        "ratio": jnp.sum(ratio_X * weights_X),
        "clipped": jnp.sum(jnp.where(ratio_X != held_X, weights_X, 0.0)),
        "kl": jnp.sum((ratio_X - 1.0 - log_ratio_X) * weights_X),
    }
    return jnp.sum(loss_X * weights_X), jnp.sum(weights_X), sums


def clipped_value(
    values_X: Float[Array, " X"],
    old_values_X: Float[Array, " X"],
    returns_X: Float[Array, " X"],
    weights_X: Float[Array, " X"],
    *,
    clip: float,
) -> tuple[Array, Array]:
    """Half the squared error of the values or of the values clipped to within `clip` of the old ones, whichever is
    larger: (loss_sum, weight_sum). As in the PPO of OpenAI's baselines.
    """
    held_X = old_values_X + jnp.clip(values_X - old_values_X, -clip, clip)
    error_X = jnp.maximum(jnp.square(values_X - returns_X), jnp.square(held_X - returns_X))
    return 0.5 * jnp.sum(error_X * weights_X), jnp.sum(weights_X)


def group_advantages(rewards_BG: Float[Array, "B G"], *, smallest_deviation: float) -> Float[Array, "B G"]:
    """GRPO's advantages (arXiv 2402.03300, section 4.1.2): the rewards of G answers to one prompt minus their mean,
    divided by their standard deviation, or by `smallest_deviation` (above 0) where that is larger. Answers with almost
    equal rewards then have advantages near 0, and answers with equal rewards exactly 0.
    """
    centred_BG = rewards_BG - rewards_BG.mean(axis=1, keepdims=True)
    return centred_BG / jnp.maximum(rewards_BG.std(axis=1, keepdims=True), smallest_deviation)


def reference_divergence(
    log_probs_X: Float[Array, " X"], reference_X: Float[Array, " X"], weights_X: Float[Array, " X"]
) -> tuple[Array, Array]:
    """KL(model || reference), estimated from the log-probabilities of tokens sampled from the model: (sum, weight_sum).
    The estimate is unbiased and never negative (arXiv 2402.03300, eq. 4).
    """
    difference_X = reference_X - log_probs_X
    return jnp.sum((jnp.exp(difference_X) - 1.0 - difference_X) * weights_X), jnp.sum(weights_X)
