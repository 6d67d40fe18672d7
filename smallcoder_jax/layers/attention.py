"""Grouped-query self-attention.

Shapes: B batch, T queries, S keys, D width, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.config import AttentionShape
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.ops.attention import attention
from smallcoder_jax.ops.attention_xla import Keys
from smallcoder_jax.ops.rope import rotate


class Attention(nnx.Module):
    """Projections around `ops.attention` (grouped queries: Ainslie et al., arXiv 2305.13245)."""

    def __init__(
        self,
        shape: AttentionShape,
        *,
        implementation: str,
        std: float,
        out_std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.shape, self.implementation = shape, implementation
        bias = shape.bias
        q_width, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.query = Linear(shape.width, q_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.key = Linear(shape.width, kv_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.value = Linear(shape.width, kv_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.output = Linear(q_width, shape.width, bias=bias, std=out_std, dtype=dtype, rngs=rngs)

    def project_keys(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        shape = (*x_BTD.shape[:2], self.shape.kv_heads, self.shape.head_size)
        return self.key(x_BTD).reshape(shape), self.value(x_BTD).reshape(shape)

    def rotated(self, x_BTNH: Float[Array, "B T N H"], positions_BT: Array) -> Float[Array, "B T N H"]:
        """Queries or keys rotated by their positions; unchanged where positions are learned."""
        theta = self.shape.rope_theta
        return x_BTNH if theta is None else rotate(x_BTNH, positions_BT, theta)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Array, segment_ids_BT: Array, keys: Keys, *, cached: bool
    ) -> Float[Array, "B T D"]:
        q_BTNH = self.query(x_BTD).reshape(*x_BTD.shape[:2], self.shape.heads, self.shape.head_size)
        if cached:
            q_BTNH = self.rotated(q_BTNH, positions_BT)
        o_BTNH = attention(
            q_BTNH,
            keys.k_BSKH,
            keys.v_BSKH,
            q_positions_BT=positions_BT,
            kv_positions_BS=keys.positions_BS,
            q_segment_ids_BT=segment_ids_BT,
            kv_segment_ids_BS=keys.segment_ids_BS,
            rope_theta=None if cached else self.shape.rope_theta,
            window=self.shape.window or None,
            # The config's choice applies to packed rows; attention to a cache always uses the XLA reference.
            implementation="xla" if cached else self.implementation,
        )
        return self.output(o_BTNH.reshape(*x_BTD.shape[:2], -1))
