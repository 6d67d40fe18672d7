"""The shape of a model, how it is computed, and on which devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from smallcoder_jax.config.fields import Section, number


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of a decoder: everything that decides what the parameters mean."""

    vocab_size: int = number(32768, low=1)
    width: int = number(768, low=1)  # D
    mlp_width: int = number(2048, low=1)  # F
    layers: int = number(12, low=1, high=10_000)  # L
    heads: int = number(6, low=1)  # N, query heads
    kv_heads: int = number(2, low=1)  # K, key-value heads
    head_size: int = number(128, low=1)  # H
    context: int = number(2048, low=1)  # the longest sequence the model is trained and evaluated at
    rope_theta: float = number(10_000.0, above=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = number(1e-6, low=0, high=1)
    positions: Literal["rope", "learned"] = "rope"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: Literal["none", "all"] = "none"
    embeddings: Literal["tied", "untied"] = "tied"
    dropout: float = number(0.0, low=0, below=1)
    window: int = number(0, low=0, zero="the whole document")  # sliding window in tokens

    def problems(self) -> Iterator[str]:
        if self.heads % self.kv_heads:
            yield f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}"
        if self.head_size % 2:
            yield f"model.head_size={self.head_size} must be even: rotary positions turn pairs"


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Section):
    """How the model is computed; none of it changes what is computed beyond rounding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products; parameters are float32
    # Products of float32 arrays in training and evaluation: exact, or of inputs rounded to bfloat16 with float32 sums
    # (mixed), twice as fast on CPUs made for it; auto is mixed there, exact elsewhere. Decoding is always exact.
    matmul: Literal["exact", "mixed", "auto"] = "exact"
    attention: Literal["auto", "xla", "cudnn", "pallas_tpu", "pallas_gpu"] = "auto"
    layers: Literal["scan", "unroll"] = "unroll"  # scan compiles faster, unroll runs faster
    remat: Literal["none", "dots", "full"] = "none"  # recomputed backward: nothing, elementwise, all

    def problems(self) -> Iterator[str]:
        if self.matmul == "mixed" and self.dtype != "float32":
            yield (
                f"compute.matmul='mixed' is of float32 products, and with compute.dtype={self.dtype!r} there are none; "
                "set compute.dtype to float32, or leave compute.matmul at auto"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices per axis; one axis may be -1: all that are left."""

    data: int = number(-1, low=-1)  # batch split, parameters replicated
    fsdp: int = number(1, low=-1)  # batch split, parameters and optimizer split
    context: int = number(
        1, low=-1
    )  # rows split along their length, keys gathered for attention; parameters replicated
    tensor: int = number(1, low=-1)  # heads and MLP width split


def parameter_count(model: ModelConfig) -> int:
    """The number of parameters of a shape, by arithmetic; a test holds it against the model itself."""
    d, f = model.width, model.mlp_width
    q_width, kv_width = model.heads * model.head_size, model.kv_heads * model.head_size
    attention = 2 * d * q_width + 2 * d * kv_width
    mlp = (3 if model.mlp == "swiglu" else 2) * d * f
    norm = d if model.norm == "rmsnorm" else 2 * d
    biases = 0
    if model.bias == "all":
        biases = q_width + 2 * kv_width + d + (2 * f if model.mlp == "swiglu" else f) + d
    tables = model.vocab_size * d * (1 if model.embeddings == "tied" else 2)
    tables += model.context * d if model.positions == "learned" else 0
    return tables + model.layers * (attention + mlp + 2 * norm + biases) + norm
