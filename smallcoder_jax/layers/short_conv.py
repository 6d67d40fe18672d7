"""A short causal convolution over packed documents.

Shapes: B batch, T positions, S positions that a state remembers, E channels, C positions that are seen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from smallcoder_jax.ops.packed import latest


class ShortConv(nnx.Module):
    """silu(sum_j kernel[j] x_{t-j}), j = 0 ... C - 1, for each channel alone. A position sees its own document only."""

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        self.size = size
        # Variance 1 / C, so that the sum has the variance of the input.
        self.taps = nnx.Param(size**-0.5 * jax.random.normal(rngs.params(), (size, channels), jnp.float32))

    def __call__(
        self, x_BTE: Float[Array, "B T E"], segment_ids_BT: Int[Array, "B T"], state: dict[str, Array]
    ) -> tuple[Float[Array, "B T E"], dict[str, Array]]:
        """The result, and the state after the last position: the last C - 1 inputs."""
        seen_BSE = jnp.concatenate([state["inputs"], x_BTE.astype(state["inputs"].dtype)], axis=1)
        segments_BS = jnp.concatenate([state["segment_ids"], segment_ids_BT], axis=1)
        length, taps_CE = x_BTE.shape[1], self.taps[...]
        total_BTE = jnp.zeros(x_BTE.shape, jnp.float32)
        for back in range(self.size):
            begin = self.size - 1 - back
            same_BT1 = (segments_BS[:, begin : begin + length] == segment_ids_BT)[..., None]
            shifted_BTE = jnp.where(same_BT1, seen_BSE[:, begin : begin + length].astype(jnp.float32), 0.0)
            total_BTE = total_BTE + shifted_BTE * taps_CE[back][None, None]
        after: Any = latest({"inputs": seen_BSE, "segment_ids": segments_BS}, segments_BS > 0, self.size - 1)
        return jax.nn.silu(total_BTE).astype(x_BTE.dtype), after

    @staticmethod
    def empty(rows: int, size: int, channels: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state before any text."""
        return {
            "inputs": jnp.zeros((rows, size - 1, channels), dtype),
            "segment_ids": jnp.zeros((rows, size - 1), jnp.int32),
        }
