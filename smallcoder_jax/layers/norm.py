"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from smallcoder_jax.ops.rms_norm import rms_norm


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    """scale * (x - mean) / sqrt(var + eps) + bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x_float = x.astype(jnp.float32)
        centred = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = centred * inverse * self.scale[...][None, None, :] + self.bias[...][None, None, :]
        return scaled.astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
