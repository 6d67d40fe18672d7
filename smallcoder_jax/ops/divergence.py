"""KL divergence of a student's next-token distributions from a teacher's, chunk by chunk: over the whole vocabulary, or
over the teacher's most probable tokens, with all others combined into one.

Shapes: X tokens, N chunks of C tokens, D and E widths of student and teacher, V vocabulary, K most probable tokens, P
parts of the mesh that each hold their own tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from smallcoder_jax.ops.chunks import in_chunks, on_own_tokens
from smallcoder_jax.ops.cross_entropy import CHUNK_BYTES, logits, unembedding_products

_NO_REST = 1e-6  # a smaller remaining probability is a rounding error of a float32 sum that should be 1


def divergences(
    hidden_XD: Float[Array, "X D"],
    unembed_VD: Float[Array, "V D"],
    teacher_hidden_XE: Float[Array, "X E"],
    teacher_unembed_VE: Float[Array, "V E"],
    temperature: float,
) -> Float[Array, " X"]:
    """KL(teacher || student) of each token in nats, both at `temperature` (Hinton et al., arXiv 1503.02531).

    Differentiable with respect to the student's hidden states and unembedding; the teacher is a constant. No logits are
    kept: the backward pass recomputes them for each chunk. On a mesh, X must be divisible by the product of the axes
    that split the batch.
    """
    return _divergences(hidden_XD, unembed_VD, teacher_unembed_VE, (teacher_hidden_XE,), temperature, _WHOLE)


def top_divergences(
    hidden_XD: Float[Array, "X D"],
    unembed_VD: Float[Array, "V D"],
    ids_XK: Int[Array, "X K"],
    log_probs_XK: Float[Array, "X K"],
    temperature: float,
) -> Float[Array, " X"]:
    """As `divergences`, from the teacher's `top_tokens` at the same temperature, with all other tokens combined into
    one. It is never above the divergence over the whole vocabulary, and equals it where K is the whole vocabulary.
    Omitting the other tokens instead would teach the student that their probability is 0.
    """
    return _divergences(hidden_XD, unembed_VD, None, (ids_XK, log_probs_XK), temperature, _TOP)


def top_tokens(
    hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"], count: int, temperature: float
) -> tuple[Int[Array, "X K"], Float[Array, "X K"]]:
    """The `count` most probable tokens at each position, and their log-probabilities at `temperature`, normalised over
    the whole vocabulary. On a mesh, the condition of `divergences` on X holds.
    """

    def run(unembed_VD: Array, hidden_XD: Array) -> tuple[Array, Array]:
        def top(part: Any) -> tuple[Array, Array]:
            log_probs_CK, ids_CK = jax.lax.top_k(_log_softmax(part, unembed_VD, temperature), count)
            return ids_CK, log_probs_CK

        found = jax.lax.map(top, in_chunks(hidden_XD, min(_chunk(unembed_VD.shape[0]), hidden_XD.shape[0])))
        return jax.tree.map(lambda x_NCK: x_NCK.reshape(-1, count)[: hidden_XD.shape[0]], found)

    return on_own_tokens(run)(unembed_VD, hidden_XD)


class _Teacher(NamedTuple):
    """The two functions that depend on how a teacher is represented. Both take a chunk of the student's
    log-probabilities [C, V], the teacher's unembedding or None, the per-token facts about the teacher, and the
    temperature. `divergence` returns the divergence [C], `gradient` its gradient with respect to the student's logits
    divided by the temperature [C, V].
    """

    divergence: Callable[[Array, Any, tuple[Array, ...], float], Array]
    gradient: Callable[[Array, Any, tuple[Array, ...], float], Array]


def _whole_divergence(student_CV: Array, unembed_VE: Array, of_token: tuple[Array, ...], temperature: float) -> Array:
    teacher_CV = _log_softmax(of_token[0], unembed_VE, temperature)
    return jnp.sum(jnp.exp(teacher_CV) * (teacher_CV - student_CV), axis=-1)


def _whole_gradient(student_CV: Array, unembed_VE: Array, of_token: tuple[Array, ...], temperature: float) -> Array:
    return jnp.exp(student_CV) - jnp.exp(_log_softmax(of_token[0], unembed_VE, temperature))


_WHOLE = _Teacher(_whole_divergence, _whole_gradient)


def _rests(student_CV: Array, ids_CK: Array, log_probs_CK: Array) -> tuple[Array, Array]:
    """The total probability of all tokens but `ids_CK`: the teacher's, and the logarithm of the student's; [C, 1]
    each."""
    rest_C1 = 1.0 - jnp.sum(jnp.exp(log_probs_CK), axis=-1, keepdims=True)
    others_CV = jnp.put_along_axis(student_CV, ids_CK, -jnp.inf, axis=-1, inplace=False)
    student_C1 = jax.nn.logsumexp(others_CV, axis=-1, keepdims=True)
    return jnp.where(rest_C1 < _NO_REST, 0.0, rest_C1), student_C1


def _top_divergence(student_CV: Array, _: None, of_token: tuple[Array, ...], temperature: float) -> Array:
    del temperature  # already applied to both sides
    ids_CK, teacher_CK = of_token
    student_CK = jnp.take_along_axis(student_CV, ids_CK, axis=-1)
    known_C = jnp.sum(jnp.exp(teacher_CK) * (teacher_CK - student_CK), axis=-1)
    rest_C1, student_rest_C1 = _rests(student_CV, ids_CK, teacher_CK)
    of_rest_C1 = jnp.where(rest_C1 > 0, rest_C1 * (jnp.log(rest_C1) - student_rest_C1), 0.0)
    return known_C + of_rest_C1[:, 0]


def _top_gradient(student_CV: Array, _: None, of_token: tuple[Array, ...], temperature: float) -> Array:
    """q - p at the teacher's top tokens; at every other token q - p_rest q / q_rest, with the totals of `_rests`."""
    del temperature
    ids_CK, teacher_CK = of_token
    rest_C1, student_rest_C1 = _rests(student_CV, ids_CK, teacher_CK)
    share_CV = jnp.where(rest_C1 > 0, rest_C1 * jnp.exp(student_CV - student_rest_C1), 0.0)
    of_top_CK = jnp.exp(jnp.take_along_axis(student_CV, ids_CK, axis=-1)) - jnp.exp(teacher_CK)
    return jnp.put_along_axis(jnp.exp(student_CV) - share_CV, ids_CK, of_top_CK, axis=-1, inplace=False)


_TOP = _Teacher(_top_divergence, _top_gradient)


def _chunk(vocabulary: int) -> int:
    """How many tokens are processed at a time, so that two sets of float32 logits stay within CHUNK_BYTES."""
    return max(CHUNK_BYTES // (8 * vocabulary), 1)


def _log_softmax(hidden_CD: Array, unembed_VD: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits(hidden_CD, unembed_VD).astype(jnp.float32) / temperature, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _divergences(
    hidden_XD: Array,
    unembed_VD: Array,
    teacher_unembed_VE: Array | None,
    of_token: tuple[Array, ...],
    temperature: float,
    teacher: _Teacher,
) -> Array:
    return _forward(hidden_XD, unembed_VD, teacher_unembed_VE, of_token, temperature, teacher)[0]


def _forward(
    hidden_XD: Array,
    unembed_VD: Array,
    teacher_unembed_VE: Array | None,
    of_token: tuple[Array, ...],
    temperature: float,
    teacher: _Teacher,
) -> tuple[Array, tuple[Any, ...]]:
    def run(unembeddings: Any, hidden_XD: Array, *of_token: Array) -> Array:
        def divergence(part: Any) -> Array:
            hidden_CD, *of_token = part
            student_CV = _log_softmax(hidden_CD, unembeddings[0], temperature)
            return teacher.divergence(student_CV, unembeddings[1], tuple(of_token), temperature)

        parts = in_chunks((hidden_XD, *of_token), min(_chunk(unembed_VD.shape[0]), hidden_XD.shape[0]))
        return jax.lax.map(divergence, parts).reshape(-1)[: hidden_XD.shape[0]]

    kl_X = on_own_tokens(run)((unembed_VD, teacher_unembed_VE), hidden_XD, *of_token)
    return kl_X, (hidden_XD, unembed_VD, teacher_unembed_VE, of_token)


def _backward(
    temperature: float, teacher: _Teacher, residuals: tuple[Any, ...], gradient_X: Array
) -> tuple[Array, Array, None, None]:
    hidden_XD, unembed_VD, teacher_unembed_VE, of_token = residuals

    def run(unembeddings: Any, hidden_XD: Array, gradient_X: Array, *of_token: Array) -> tuple[Array, Array]:
        def add(d_unembed_VD: Array, part: Any) -> tuple[Array, Array]:
            hidden_CD, gradient_C, *of_token = part
            student_CV = _log_softmax(hidden_CD, unembeddings[0], temperature)
            difference_CV = teacher.gradient(student_CV, unembeddings[1], tuple(of_token), temperature) / temperature
            d_logits_CV = (difference_CV * gradient_C[:, None]).astype(hidden_CD.dtype)
            d_hidden_CD, more_VD = unembedding_products(d_logits_CV, hidden_CD, unembeddings[0], jnp.float32)
            return d_unembed_VD + more_VD, d_hidden_CD

        parts = in_chunks((hidden_XD, gradient_X, *of_token), min(_chunk(unembed_VD.shape[0]), hidden_XD.shape[0]))
        d_unembed_VD, d_hidden_NCD = jax.lax.scan(add, jnp.zeros(unembeddings[0].shape, jnp.float32), parts)
        return d_hidden_NCD.reshape(-1, d_hidden_NCD.shape[-1])[: hidden_XD.shape[0]], d_unembed_VD[None]

    d_hidden_XD, d_unembed_PVD = on_own_tokens(run)((unembed_VD, teacher_unembed_VE), hidden_XD, gradient_X, *of_token)
    return d_hidden_XD, d_unembed_PVD.sum(axis=0).astype(unembed_VD.dtype), None, None


_divergences.defvjp(_forward, _backward)
