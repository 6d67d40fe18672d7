"""The decoder. SmallCoder (Llama style), the staged sizes and GPT-2 differ only in their configuration.

Shapes: B batch, T positions, D width, V vocabulary, L layers, K key-value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.config import ComputeConfig, DecoderConfig
from smallcoder_jax.layers.attention import Attention
from smallcoder_jax.layers.dropout import dropout
from smallcoder_jax.layers.embedding import Embedding
from smallcoder_jax.layers.linear import Linear
from smallcoder_jax.layers.mlp import MLPS
from smallcoder_jax.layers.norm import NORMS
from smallcoder_jax.layers.remat import REMAT_POLICIES
from smallcoder_jax.mesh import split_activations
from smallcoder_jax.models.decoder import cache as kv_cache
from smallcoder_jax.models.family import Hidden
from smallcoder_jax.ops.attention_xla import Keys


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: DecoderConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        norm, std = NORMS[model.norm], model.width**-0.5
        # The residual stream adds up 2 L outputs, so their kernels are initialised smaller (GPT-2, section 2.3).
        shrink = (2 * model.layers) ** -0.5
        self.dropout = model.dropout
        self.attention_norm = norm(model.width, model.norm_eps)
        self.attention = Attention(
            model.attention(),
            implementation=compute.attention,
            std=std,
            out_std=(model.heads * model.head_size) ** -0.5 * shrink,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = norm(model.width, model.norm_eps)
        self.mlp = MLPS[model.mlp](
            model.width,
            model.mlp_width,
            bias=model.bias == "all",
            std=std,
            out_std=model.mlp_width**-0.5 * shrink,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        key: Array | None = None,
        extend_keys: Callable[[Array, Array], Keys] | None = None,
    ) -> Float[Array, "B T D"]:
        """The output of the block. `extend_keys` turns the block's new rotated keys and values into all keys that the
        queries may attend to, those in a cache included.
        """
        normed_BTD = self.attention_norm(x_BTD)
        k_BTKH, v_BTKH = self.attention.project_keys(normed_BTD)
        if extend_keys:
            keys = extend_keys(self.attention.rotated(k_BTKH, positions_BT), v_BTKH)
        else:
            keys = Keys(k_BTKH, v_BTKH, positions_BT, segment_ids_BT)
        attended_BTD = self.attention(normed_BTD, positions_BT, segment_ids_BT, keys, cached=extend_keys is not None)
        x_BTD = split_activations(x_BTD + dropout(attended_BTD, self.dropout, _fold(key, 0)))
        return split_activations(x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, _fold(key, 1)))


class Decoder(nnx.Module):
    """Computes hidden states from tokens. Parameters are float32, activations have `compute.dtype`.

    With `compute.layers == "scan"` the blocks are one module whose parameters have a leading axis L.
    """

    def __init__(self, model: DecoderConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.model, self.compute = model, compute
        self.embed = Embedding(model.vocab_size, model.width, rngs=rngs)
        learned = model.positions == "learned"
        self.position_embed = Embedding(model.context, model.width, rngs=rngs) if learned else None
        if compute.layers == "scan":
            make = nnx.vmap(lambda layer_rngs: Block(model, compute, rngs=layer_rngs))
            self.blocks: Any = make(rngs.split(model.layers))
        else:
            self.blocks = nnx.List([Block(model, compute, rngs=rngs) for _ in range(model.layers)])
        self.final_norm = NORMS[model.norm](model.width, model.norm_eps)
        untied = model.embeddings == "untied"
        dtype = jnp.dtype(compute.dtype)
        self.unembed = (
            Linear(model.width, model.vocab_size, bias=False, std=0.4 * model.width**-0.5, dtype=dtype, rngs=rngs)
            if untied
            else None
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        dropout_key: Array | None = None,
    ) -> Hidden:
        """See `Module`. The decoder has no losses of its own."""
        x_BTD = self._embed(tokens_BT, positions_BT, dropout_key)

        def apply(x_BTD: Array, block: tuple[nnx.GraphDef, nnx.State], layer: Array | int) -> Array:
            return nnx.merge(*block)(x_BTD, positions_BT, segment_ids_BT, _fold(dropout_key, layer))

        if self.compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.compute.remat])
        if self.compute.layers == "scan":
            graph, stacked = nnx.split(self.blocks)
            layers = jnp.arange(self.model.layers, dtype=jnp.int32)
            x_BTD, _ = jax.lax.scan(
                lambda x, layer: (apply(x, (graph, layer[0]), layer[1]), None), x_BTD, (stacked, layers)
            )
        else:
            for layer, block in enumerate(self.blocks):
                x_BTD = apply(x_BTD, nnx.split(block), layer)
        return Hidden(self.final_norm(x_BTD))

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: kv_cache.Cache,
    ) -> tuple[Float[Array, "B T D"], kv_cache.Cache]:
        """See `Module`. The caller must not write past the length of the cache."""
        column = cache["written"]
        cache = {
            "keys": list(cache["keys"]),
            "values": list(cache["values"]),
            "positions": kv_cache.write(cache["positions"], positions_BT, column),
            "segment_ids": kv_cache.write(cache["segment_ids"], segment_ids_BT, column),
            "written": column + tokens_BT.shape[1],
        }

        def extend_keys(layer: int, k_BTKH: Array, v_BTKH: Array) -> Keys:
            cache["keys"][layer] = kv_cache.write(cache["keys"][layer], k_BTKH, column)
            cache["values"][layer] = kv_cache.write(cache["values"][layer], v_BTKH, column)
            return Keys(cache["keys"][layer], cache["values"][layer], cache["positions"], cache["segment_ids"])

        x_BTD = self._embed(tokens_BT, positions_BT, None)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, positions_BT, segment_ids_BT, extend_keys=functools.partial(extend_keys, layer))
        return self.final_norm(x_BTD), cache

    def unembedding(self) -> Float[Array, "V D"]:
        """The matrix whose rows score the vocabulary: the embedding itself when the two are tied."""
        return self.embed.embedding[...] if self.unembed is None else self.unembed.kernel[...].T

    def _embed(self, tokens_BT: Array, positions_BT: Array, dropout_key: Array | None) -> Array:
        x_BTD = split_activations(self.embed(tokens_BT))
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT)
        x_BTD = x_BTD.astype(self.compute.dtype)
        return dropout(x_BTD, self.model.dropout, _fold(dropout_key, self.model.layers))


def _fold(key: Array | None, data: Array | int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, data)
