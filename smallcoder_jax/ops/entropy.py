"""Entropy of a model's next-token distribution over the whole vocabulary, chunk by chunk.

Shapes: X tokens, N chunks of C tokens, D width, V vocabulary, P parts of the mesh that each hold their own tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.chunks import in_chunks, on_own_tokens
from smallcoder_jax.ops.cross_entropy import CHUNK_BYTES, logits, unembedding_products


@jax.custom_vjp
def entropies(hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"]) -> Float[Array, " X"]:
    """Entropy in nats of softmax(hidden @ unembed^T) for each token.

    Differentiable with respect to both arguments. No logits are kept: the backward pass recomputes them for each chunk.
    On a mesh, X must be divisible by the product of the axes that split the batch.
    """
    return _forward(hidden_XD, unembed_VD)[0]


def _chunk(tokens: int, vocabulary: int) -> int:
    """How many tokens are processed at a time, so that float32 logits and probabilities stay within CHUNK_BYTES."""
    return min(max(CHUNK_BYTES // (8 * vocabulary), 1), tokens)


def _log_softmax(hidden_CD: Array, unembed_VD: Array) -> Array:
    return jax.nn.log_softmax(logits(hidden_CD, unembed_VD).astype(jnp.float32), axis=-1)


def _forward(hidden_XD: Array, unembed_VD: Array) -> tuple[Array, tuple[Array, Array]]:
    def run(unembed_VD: Array, hidden_XD: Array) -> Array:
        def entropy(hidden_CD: Array) -> Array:
            log_p_CV = _log_softmax(hidden_CD, unembed_VD)
            return -jnp.sum(jnp.exp(log_p_CV) * log_p_CV, axis=-1)

        parts_NCD = in_chunks(hidden_XD, _chunk(hidden_XD.shape[0], unembed_VD.shape[0]))
        return jax.lax.map(entropy, parts_NCD).reshape(-1)[: hidden_XD.shape[0]]

    return on_own_tokens(run)(unembed_VD, hidden_XD), (hidden_XD, unembed_VD)


def _backward(residuals: tuple[Array, Array], gradient_X: Array) -> tuple[Array, Array]:
    hidden_XD, unembed_VD = residuals

    def run(unembed_VD: Array, *per_token: Array) -> tuple[Array, Array]:
        def add(d_unembed_VD: Array, part: Any) -> tuple[Array, Array]:
            hidden_CD, gradient_C = part
            log_p_CV = _log_softmax(hidden_CD, unembed_VD)
            p_CV = jnp.exp(log_p_CV)
            entropy_C1 = -jnp.sum(p_CV * log_p_CV, axis=-1, keepdims=True)
            d_logits_CV = (-p_CV * (log_p_CV + entropy_C1) * gradient_C[:, None]).astype(hidden_CD.dtype)
            d_hidden_CD, more_VD = unembedding_products(d_logits_CV, hidden_CD, unembed_VD, jnp.float32)
            return d_unembed_VD + more_VD, d_hidden_CD

        tokens, width = per_token[0].shape
        parts = in_chunks(per_token, _chunk(tokens, unembed_VD.shape[0]))
        d_unembed_VD, d_hidden_NCD = jax.lax.scan(add, jnp.zeros(unembed_VD.shape, jnp.float32), parts)
        return d_hidden_NCD.reshape(-1, width)[:tokens], d_unembed_VD[None]

    d_hidden_XD, d_unembed_PVD = on_own_tokens(run)(unembed_VD, hidden_XD, gradient_X)
    return d_hidden_XD, d_unembed_PVD.sum(axis=0).astype(unembed_VD.dtype)


entropies.defvjp(_forward, _backward)
