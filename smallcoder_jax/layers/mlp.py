"""Feed-forward layers. Shapes: B batch, T positions, D width, F MLP width."""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from smallcoder_jax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self, width: int, mlp_width: int, *, bias: bool, std: float, out_std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.gate = Linear(width, mlp_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.up = Linear(width, mlp_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_width, width, bias=bias, std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GELU(nnx.Module):
    """down(gelu(up(x))), tanh approximation as in GPT-2 (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def __init__(
        self, width: int, mlp_width: int, *, bias: bool, std: float, out_std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.up = Linear(width, mlp_width, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_width, width, bias=bias, std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=True))


MLPS = {"swiglu": SwiGLU, "gelu": GELU}
