"""The shape of a model, how it is computed, and on which devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config.fields import Section, number, shown


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of a model: everything that decides what its parameters mean, and what every family has of it.

    Each family has a section of its own, a subclass with its name as the default of `family`; being defined makes it
    known (`model_section`). What computes it is `models.families`.
    """

    # Fields that the sizes of the mesh's axes have to divide, by axis.
    DIVIDED: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Fields on which no parameter depends: they may be others in a model that training begins with.
    MAY_DIFFER: ClassVar[frozenset[str]] = frozenset({"context", "dropout"})

    family: str = ""
    vocab_size: int = number(32768, low=1)
    width: int = number(768, low=1)  # D, of the hidden states that logits and scores are made from
    context: int = number(2048, low=1)  # the longest sequence the model is trained and evaluated at
    dropout: float = number(0.0, low=0, below=1)

    def parameter_count(self) -> int:
        """The number of parameters, by arithmetic."""
        raise NotImplementedError(f"{type(self).__name__} does not count its parameters")

    def summary(self) -> str:
        """The shape on one line, for the table at the start."""
        raise NotImplementedError(f"{type(self).__name__} does not describe its shape")

    def may_differ(self) -> frozenset[str]:
        """The fields of MAY_DIFFER that hold for this shape."""
        return self.MAY_DIFFER


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The shape of a decoder: SmallCoder (in the style of Llama), the staged sizes and GPT-2."""

    DIVIDED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tensor": ("kv_heads", "mlp_width", "vocab_size"),
        "fsdp": ("width",),
    }
    MAY_DIFFER: ClassVar[frozenset[str]] = frozenset({"context", "dropout", "window"})

    family: Literal["decoder"] = "decoder"
    mlp_width: int = number(2048, low=1)  # F
    layers: int = number(12, low=1, high=10_000)  # L
    heads: int = number(6, low=1)  # N, query heads
    kv_heads: int = number(2, low=1)  # K, key-value heads
    head_size: int = number(128, low=1)  # H
    rope_theta: float = number(10_000.0, above=0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = number(1e-6, low=0, high=1)
    positions: Literal["rope", "learned"] = "rope"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: Literal["none", "all"] = "none"
    embeddings: Literal["tied", "untied"] = "tied"
    window: int = number(0, low=0, zero="the whole document")  # sliding window in tokens

    def problems(self) -> Iterator[str]:
        if self.heads % self.kv_heads:
            yield f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}"
        if self.head_size % 2:
            yield f"model.head_size={self.head_size} must be even: rotary positions turn pairs"

    def parameter_count(self) -> int:
        """By arithmetic; a test holds it against the model itself."""
        d, f = self.width, self.mlp_width
        q_width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * d * q_width + 2 * d * kv_width
        mlp = (3 if self.mlp == "swiglu" else 2) * d * f
        norm = d if self.norm == "rmsnorm" else 2 * d
        biases = 0
        if self.bias == "all":
            biases = q_width + 2 * kv_width + d + (2 * f if self.mlp == "swiglu" else f) + d
        tables = self.vocab_size * d * (1 if self.embeddings == "tied" else 2)
        tables += self.context * d if self.positions == "learned" else 0
        return tables + self.layers * (attention + mlp + 2 * norm + biases) + norm

    def summary(self) -> str:
        return (
            f"width {self.width}, layers {self.layers}, heads {self.heads}:{self.kv_heads} x {self.head_size}, "
            f"MLP {self.mlp_width}, vocabulary {self.vocab_size}"
        )

    def may_differ(self) -> frozenset[str]:
        """Learned positions are a table of as many rows as the context has."""
        return self.MAY_DIFFER - ({"context"} if self.positions == "learned" else set())


def model_section(family: Any) -> type[ModelConfig]:
    """The section of a family of models, by its name. Raises UserError for one that is not known."""
    known = {cls.family: cls for cls in ModelConfig.__subclasses__()}
    if not isinstance(family, str) or family not in known:
        raise UserError(f"model.family={shown(family)}: expected one of {', '.join(map(repr, sorted(known)))}")
    return known[family]


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
