"""A table of embedding vectors that are looked up by id.

Shapes: B batch, T positions, D width, V entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.mesh import whole_width


class Embedding(nnx.Module):
    """Looks up rows of a [V, D] table."""

    def __init__(self, entries: int, width: int, *, rngs: nnx.Rngs):
        std = 0.4 * width**-0.5  # so that logits start with a standard deviation of 0.4 at any width
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (entries, width), jnp.float32))

    def __call__(self, ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(whole_width(self.embedding[...]), ids_BT, axis=0)
