"""Losses as sums over tokens, so that accumulation and data parallelism are exact.

Shapes: X tokens (B times T), D width, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

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
    by w: `nats`, `correct` (the target scores highest) and `top5`.
    """
    losses = token_losses(hidden_XD, unembed_VD, targets_X)
    nll_sum = jnp.sum(losses.nll_X * weights_X)
    loss_sum = nll_sum
    if z_loss:
        loss_sum = loss_sum + z_loss * jnp.sum(jnp.square(losses.log_z_X) * weights_X)

    def weigh(right_X: Array) -> Array:
        return jnp.sum(jnp.where(right_X, weights_X, 0.0))

    sums = {"nats": nll_sum, "correct": weigh(losses.best_X), "top5": weigh(losses.rank_X < 5)}
    return loss_sum, jnp.sum(weights_X), sums
