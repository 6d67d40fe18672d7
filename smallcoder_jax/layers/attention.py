"""Grouped-query self-attention.

Shapes: B batch, T queries, S keys, D width, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.config import DecoderConfig
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.ops.attention import attention
from smallcoder_jax.ops.attention_xla import Keys
from smallcoder_jax.ops.rope import rotate


class Attention(nnx.Module):
    """Projections around `ops.attention` (grouped queries: Ainslie et al., arXiv 2305.13245)."""

    def __init__(
        self, model: DecoderConfig, *, implementation: str, std: float, out_std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.model, self.implementation = model, implementation
        bias = model.bias == "all"
        q_width, kv_width = model.heads * model.head_size, model.kv_heads * model.head_size
        self.query = Linear(model.width, q_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.key = Linear(model.width, kv_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.value = Linear(model.width, kv_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.output = Linear(q_width, model.width, bias=bias, std=out_std, dtype=dtype, rngs=rngs)

    def project_keys(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        shape = (*x_BTD.shape[:2], self.model.kv_heads, self.model.head_size)
        return self.key(x_BTD).reshape(shape), self.value(x_BTD).reshape(shape)

    def rotated(self, x_BTNH: Float[Array, "B T N H"], positions_BT: Array) -> Float[Array, "B T N H"]:
        """Queries or keys rotated by their positions; unchanged where positions are learned."""
        return rotate(x_BTNH, positions_BT, self.model.rope_theta) if self.model.positions == "rope" else x_BTNH

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Array, segment_ids_BT: Array, keys: Keys, *, cached: bool
    ) -> Float[Array, "B T D"]:
        q_BTNH = self.query(x_BTD).reshape(*x_BTD.shape[:2], self.model.heads, self.model.head_size)
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
            rope_theta=self.model.rope_theta if self.model.positions == "rope" and not cached else None,
            window=self.model.window or None,
            # The config's choice applies to packed rows; attention to a cache always uses the XLA reference.
            implementation="xla" if cached else self.implementation,
        )
        return self.output(o_BTNH.reshape(*x_BTD.shape[:2], -1))
