"""Cross-entropy over the vocabulary without float32 logits in memory.

Shapes: X tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from smallcoder_jax.ops.precision import matmul_precision


class TokenLosses(NamedTuple):
    """Per token: negative log-likelihood in nats, log of the partition function, whether no entry scores higher, how
    many do. The last is a pass of its own over the logits, which a caller that does not use it does not pay for.
    """

    nll_X: Float[Array, " X"]
    log_z_X: Float[Array, " X"]
    best_X: Bool[Array, " X"]
    rank_X: Int[Array, " X"]


def logits(hidden_XD: Array, unembed_VD: Array) -> Array:
    """hidden @ unembed^T in the dtype of `hidden_XD`: [X, V]."""
    return jax.lax.dot_general(
        hidden_XD,
        unembed_VD.astype(hidden_XD.dtype),
        (((hidden_XD.ndim - 1,), (1,)), ((), ())),
        precision=matmul_precision(hidden_XD.dtype),
    )


@jax.custom_vjp
def token_losses(
    hidden_XD: Float[Array, "X D"], unembed_VD: Float[Array, "V D"], targets_X: Int[Array, " X"]
) -> TokenLosses:
    """Cross-entropy of `targets_X` under softmax(hidden @ unembed^T), with a float32 log-sum-exp.

    The logits are kept once, in the dtype of `hidden_XD`; the backward pass makes softmax from them and the saved
    log-sum-exp. Differentiable in hidden and unembedding, through nll and log_z.
    """
    return _forward(hidden_XD, unembed_VD, targets_X)[0]


def _forward(hidden_XD: Array, unembed_VD: Array, targets_X: Array) -> tuple[TokenLosses, tuple[Array, ...]]:
    logits_XV = logits(hidden_XD, unembed_VD)
    target_logit_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=1)[:, 0]
    largest_X = logits_XV.max(axis=-1)
    exponent_XV = jnp.exp(logits_XV.astype(jnp.float32) - largest_X.astype(jnp.float32)[:, None])
    log_z_X = largest_X.astype(jnp.float32) + jnp.log(exponent_XV.sum(axis=-1))
    rank_X = jnp.sum(logits_XV > target_logit_X[:, None], axis=-1, dtype=jnp.int32)
    losses = TokenLosses(log_z_X - target_logit_X.astype(jnp.float32), log_z_X, target_logit_X >= largest_X, rank_X)
    return losses, (hidden_XD, unembed_VD, targets_X, logits_XV, log_z_X)


def _backward(residuals: tuple[Array, ...], gradient: TokenLosses) -> tuple[Array, Array, None]:
    hidden_XD, unembed_VD, targets_X, logits_XV, log_z_X = residuals
    d_nll_X, d_log_z_X = gradient.nll_X, gradient.log_z_X
    softmax_XV = jnp.exp(logits_XV.astype(jnp.float32) - log_z_X[:, None])
    is_target_XV = jnp.arange(logits_XV.shape[1], dtype=targets_X.dtype)[None, :] == targets_X[:, None]
    d_logits_XV = softmax_XV * (d_nll_X + d_log_z_X)[:, None] - jnp.where(is_target_XV, d_nll_X[:, None], 0.0)
    d_logits_XV = d_logits_XV.astype(hidden_XD.dtype)
    precision = matmul_precision(hidden_XD.dtype)
    d_hidden_XD = jnp.einsum("xv,vd->xd", d_logits_XV, unembed_VD.astype(hidden_XD.dtype), precision=precision)
    d_unembed_VD = jnp.einsum(
        "xv,xd->vd", d_logits_XV, hidden_XD, precision=precision, preferred_element_type=unembed_VD.dtype
    )
    return d_hidden_XD, d_unembed_VD, None


token_losses.defvjp(_forward, _backward)
