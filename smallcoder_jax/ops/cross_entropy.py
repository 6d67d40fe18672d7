"""Cross-entropy over the vocabulary without float32 logits in memory: for all tokens at once, or chunk by chunk.

Shapes: X tokens, N chunks of C tokens, D width, V vocabulary, P parts of the mesh that each hold their own tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from smallcoder_jax.mesh import TOKEN_AXES
from smallcoder_jax.ops.chunks import in_chunks, on_own_tokens
from smallcoder_jax.ops.precision import product

# Computing all logits at once is less work, as none are recomputed. The limit is a quarter of the 16 GiB that the
# smallest accelerators have.
WHOLE_BYTES = 4 * 2**30
# Chunks are large, so that adding to the unembedding's gradient, once per chunk, costs little compared with the matrix
# products.
CHUNK_BYTES = 512 * 2**20


class Choice(NamedTuple):
    """For how many tokens a device computes logits at a time (None: all of its tokens), and why."""

    chunk: int | None
    reason: str


class TokenLosses(NamedTuple):
    """Per token: the target's negative log-likelihood in nats, the log of the partition function, whether no entry
    scores higher than the target, and how many do. The count is a separate pass over the logits, which the compiler
    removes where a caller does not use it.
    """

    nll_X: Float[Array, " X"]
    log_z_X: Float[Array, " X"]
    best_X: Bool[Array, " X"]
    rank_X: Int[Array, " X"]


def choose(tokens: int, vocabulary: int, dtype: DTypeLike, axes: Mapping[str, int]) -> Choice:
    """Chooses by the memory that the logits of all `tokens` in `dtype` would take on each device of a mesh.

    `axes`: the size of each mesh axis by name; {} without a mesh.
    """
    token_bytes = vocabulary // axes.get("tensor", 1) * jnp.dtype(dtype).itemsize
    size = tokens // math.prod(axes.get(axis, 1) for axis in TOKEN_AXES) * token_bytes
    reason = f"{size / 2**30:.2f} GiB of logits per device, limit {WHOLE_BYTES / 2**30:.2f}"
    if size <= WHOLE_BYTES:
        return Choice(None, reason)
    largest = max(CHUNK_BYTES // token_bytes, 1)
    return Choice(1 << (largest.bit_length() - 1), reason)  # a power of two divides most lengths


def logits(hidden_XD: Array, unembed_VD: Array) -> Array:
    """hidden @ unembed^T in the dtype of `hidden_XD`: [X, V]."""
    return product("...d,vd->...v", hidden_XD, unembed_VD, hidden_XD.dtype)


def token_losses(
    hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"], targets_X: Int[Array, " X"]
) -> TokenLosses:
    """Cross-entropy of `targets_X` under softmax(hidden @ unembed^T), with a float32 log-sum-exp.

    Differentiable with respect to the hidden states and the unembedding, through nll and log_z. The logits have the
    dtype of `hidden_XD`. `choose` decides whether all are kept for the backward pass or recomputed there chunk by
    chunk.
    """
    axes = jax.sharding.get_abstract_mesh().shape
    chunk = choose(hidden_XD.shape[0], unembed_VD.shape[0], hidden_XD.dtype, axes).chunk
    if chunk is None:
        return whole_losses(hidden_XD, unembed_VD, targets_X)
    return chunked_losses(hidden_XD, unembed_VD, targets_X, chunk)


@jax.custom_vjp
def whole_losses(
    hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"], targets_X: Int[Array, " X"]
) -> TokenLosses:
    """`token_losses` with the logits of all tokens at once. The backward pass computes the softmax from the kept logits
    and log-sum-exp.
    """
    return _whole_forward(hidden_XD, unembed_VD, targets_X)[0]


def _whole_forward(hidden_XD: Array, unembed_VD: Array, targets_X: Array) -> tuple[TokenLosses, tuple[Array, ...]]:
    logits_XV = logits(hidden_XD, unembed_VD)
    losses = _losses(logits_XV, targets_X)
    return losses, (hidden_XD, unembed_VD, targets_X, logits_XV, losses.log_z_X)


def _whole_backward(residuals: tuple[Array, ...], gradient: TokenLosses) -> tuple[Array, Array, None]:
    hidden_XD, unembed_VD, targets_X, logits_XV, log_z_X = residuals
    d_logits_XV = _d_logits(logits_XV, targets_X, log_z_X, gradient.nll_X, gradient.log_z_X)
    return *unembedding_products(d_logits_XV, hidden_XD, unembed_VD, unembed_VD.dtype), None


whole_losses.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_losses(
    hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"], targets_X: Int[Array, " X"], chunk: int
) -> TokenLosses:
    """`token_losses` with the logits of `chunk` tokens at a time on each device. No logits are kept: the backward pass
    recomputes them for each chunk, and sums the unembedding's gradient in float32.

    On a mesh, X must be divisible by the product of the axes that split the batch.
    """
    return _chunked_forward(hidden_XD, unembed_VD, targets_X, chunk)[0]


def _chunked_forward(
    hidden_XD: Array, unembed_VD: Array, targets_X: Array, chunk: int
) -> tuple[TokenLosses, tuple[Array, ...]]:
    def run(unembed_VD: Array, hidden_XD: Array, targets_X: Array) -> TokenLosses:
        parts = in_chunks((hidden_XD, targets_X), chunk)
        losses = jax.lax.map(lambda part: _losses(logits(part[0], unembed_VD), part[1]), parts)
        return jax.tree.map(lambda x_NC: x_NC.reshape(-1)[: hidden_XD.shape[0]], losses)

    losses = on_own_tokens(run)(unembed_VD.astype(hidden_XD.dtype), hidden_XD, targets_X)
    return losses, (hidden_XD, unembed_VD, targets_X, losses.log_z_X)


def _chunked_backward(chunk: int, residuals: tuple[Array, ...], gradient: TokenLosses) -> tuple[Array, Array, None]:
    hidden_XD, unembed_VD, targets_X, log_z_X = residuals

    def run(unembed_VD: Array, hidden_XD: Array, *per_token: Array) -> tuple[Array, Array]:
        def add(d_unembed_VD: Array, part: Any) -> tuple[Array, Array]:
            hidden_CD, *per_token = part
            d_logits_CV = _d_logits(logits(hidden_CD, unembed_VD), *per_token)
            d_hidden_CD, more_VD = unembedding_products(d_logits_CV, hidden_CD, unembed_VD, jnp.float32)
            return d_unembed_VD + more_VD, d_hidden_CD

        parts = in_chunks((hidden_XD, *per_token), chunk)
        d_unembed_VD, d_hidden_NCD = jax.lax.scan(add, jnp.zeros(unembed_VD.shape, jnp.float32), parts)
        # Summed over the devices by the caller: summed here, XLA would first gather what `tensor` splits.
        return d_hidden_NCD.reshape(-1, hidden_XD.shape[1])[: hidden_XD.shape[0]], d_unembed_VD[None]

    d_hidden_XD, d_unembed_PVD = on_own_tokens(run)(
        unembed_VD.astype(hidden_XD.dtype), hidden_XD, targets_X, log_z_X, gradient.nll_X, gradient.log_z_X
    )
    return d_hidden_XD, d_unembed_PVD.sum(axis=0).astype(unembed_VD.dtype), None


chunked_losses.defvjp(_chunked_forward, _chunked_backward)


def _losses(logits_XV: Array, targets_X: Array) -> TokenLosses:
    target_logit_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=1)[:, 0]
    largest_X = logits_XV.max(axis=-1)
    exponent_XV = jnp.exp(logits_XV.astype(jnp.float32) - largest_X.astype(jnp.float32)[:, None])
    log_z_X = largest_X.astype(jnp.float32) + jnp.log(exponent_XV.sum(axis=-1))
    # Counts entries that are not known to be at most the target's, so that the target ranks last among NaNs, not first.
    rank_X = jnp.sum(~(logits_XV <= target_logit_X[:, None]), axis=-1, dtype=jnp.int32)
    return TokenLosses(log_z_X - target_logit_X.astype(jnp.float32), log_z_X, target_logit_X >= largest_X, rank_X)


def _d_logits(logits_XV: Array, targets_X: Array, log_z_X: Array, d_nll_X: Array, d_log_z_X: Array) -> Array:
    """The gradient with respect to the logits, in their dtype."""
    softmax_XV = jnp.exp(logits_XV.astype(jnp.float32) - log_z_X[:, None])
    is_target_XV = jnp.arange(logits_XV.shape[1], dtype=targets_X.dtype)[None, :] == targets_X[:, None]
    d_logits_XV = softmax_XV * (d_nll_X + d_log_z_X)[:, None] - jnp.where(is_target_XV, d_nll_X[:, None], 0.0)
    return d_logits_XV.astype(logits_XV.dtype)


def unembedding_products(
    d_logits_XV: Array, hidden_XD: Array, unembed_VD: Array, unembed_dtype: DTypeLike
) -> tuple[Array, Array]:
    """The gradients with respect to the hidden states, in their dtype, and the unembedding, in `unembed_dtype`."""
    d_hidden_XD = product("xv,vd->xd", d_logits_XV, unembed_VD, hidden_XD.dtype)
    return d_hidden_XD, product("xv,xd->vd", d_logits_XV, hidden_XD, unembed_dtype)
