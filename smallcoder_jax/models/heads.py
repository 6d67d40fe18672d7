"""A scalar head on hidden states, which predicts a reward or a value. Its parameters are the part `head`.

Shapes: B rows, T positions, D width, S selected positions of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.models.build import Params


def init_head(width: int, key: Array) -> Params:
    """Fresh parameters. On normed hidden states, scores have a standard deviation of about 1 / sqrt(width)."""
    return {"kernel": jax.random.normal(key, (width, 1), jnp.float32) / width, "bias": jnp.zeros(1, jnp.float32)}


def head_scores(head: Params, hidden_BTD: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """One score for every position, computed in float32."""
    products = jnp.matmul(hidden_BTD.astype(jnp.float32), head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return products[..., 0] + head["bias"][0]


def scores_at(head: Params, hidden_BTD: Float[Array, "B T D"], places_BS: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """The scores at the positions `places_BS` of each row."""
    return head_scores(head, jnp.take_along_axis(hidden_BTD, places_BS[..., None], axis=1))
