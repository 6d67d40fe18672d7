"""How far a student's next-token distributions are from a teacher's, over the whole vocabulary, chunk by chunk.

Shapes: X tokens, N chunks of C tokens, D and E widths of student and teacher, V vocabulary, P parts of the mesh that
have tokens of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.chunks import in_chunks, on_own_tokens
from smallcoder_jax.ops.cross_entropy import CHUNK_BYTES, logits, unembedding_products


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def divergences(
    hidden_XD: Float[Array, "X D"],
    unembed_VD: Float[Array, "V D"],
    teacher_hidden_XE: Float[Array, "X E"],
    teacher_unembed_VE: Float[Array, "V E"],
    temperature: float,
) -> Float[Array, " X"]:
    """KL(teacher || student) of each token in nats, both at `temperature` (Hinton et al., arXiv 1503.02531).

    Differentiable in the student's hidden states and unembedding; the teacher is a constant. No logits are kept: the
    backward pass makes each chunk's again. On a mesh, X divides over the axes that split the batch.
    """
    return _forward(hidden_XD, unembed_VD, teacher_hidden_XE, teacher_unembed_VE, temperature)[0]


def _chunk(vocabulary: int) -> int:
    """Tokens at a time: two sets of float32 logits within the limit."""
    return max(CHUNK_BYTES // (8 * vocabulary), 1)


def _log_softmax(hidden_CD: Array, unembed_VD: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits(hidden_CD, unembed_VD).astype(jnp.float32) / temperature, axis=-1)


def _forward(
    hidden_XD: Array, unembed_VD: Array, teacher_hidden_XE: Array, teacher_unembed_VE: Array, temperature: float
) -> tuple[Array, tuple[Array, ...]]:
    def run(unembeddings: Any, *hidden: Array) -> Array:
        def divergence(part: Any) -> Array:
            student_CV, teacher_CV = (_log_softmax(*pair, temperature) for pair in zip(part, unembeddings, strict=True))
            return jnp.sum(jnp.exp(teacher_CV) * (teacher_CV - student_CV), axis=-1)

        kl_NC = jax.lax.map(divergence, in_chunks(hidden, min(_chunk(unembed_VD.shape[0]), hidden[0].shape[0])))
        return kl_NC.reshape(-1)[: hidden[0].shape[0]]

    kl_X = on_own_tokens(run)((unembed_VD, teacher_unembed_VE), hidden_XD, teacher_hidden_XE)
    return kl_X, (hidden_XD, unembed_VD, teacher_hidden_XE, teacher_unembed_VE)


def _backward(temperature: float, residuals: tuple[Array, ...], gradient_X: Array) -> tuple[Array, Array, Array, Array]:
    hidden_XD, unembed_VD, teacher_hidden_XE, teacher_unembed_VE = residuals

    def run(unembeddings: Any, *per_token: Array) -> tuple[Array, Array]:
        def add(d_unembed_VD: Array, part: Any) -> tuple[Array, Array]:
            hidden_CD, teacher_hidden_CE, gradient_C = part
            student_CV = _log_softmax(hidden_CD, unembeddings[0], temperature)
            teacher_CV = _log_softmax(teacher_hidden_CE, unembeddings[1], temperature)
            difference_CV = (jnp.exp(student_CV) - jnp.exp(teacher_CV)) / temperature
            d_logits_CV = (difference_CV * gradient_C[:, None]).astype(hidden_CD.dtype)
            d_hidden_CD, more_VD = unembedding_products(d_logits_CV, hidden_CD, unembeddings[0], jnp.float32)
            return d_unembed_VD + more_VD, d_hidden_CD

        parts = in_chunks(per_token, min(_chunk(unembed_VD.shape[0]), per_token[0].shape[0]))
        d_unembed_VD, d_hidden_NCD = jax.lax.scan(add, jnp.zeros(unembeddings[0].shape, jnp.float32), parts)
        return d_hidden_NCD.reshape(-1, d_hidden_NCD.shape[-1])[: per_token[0].shape[0]], d_unembed_VD[None]

    d_hidden_XD, d_unembed_PVD = on_own_tokens(run)(
        (unembed_VD, teacher_unembed_VE), hidden_XD, teacher_hidden_XE, gradient_X
    )
    d_unembed_VD = d_unembed_PVD.sum(axis=0).astype(unembed_VD.dtype)
    return d_hidden_XD, d_unembed_VD, jnp.zeros_like(teacher_hidden_XE), jnp.zeros_like(teacher_unembed_VE)


divergences.defvjp(_forward, _backward)
