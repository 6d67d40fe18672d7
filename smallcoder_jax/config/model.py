"""The shape of a model, how it is computed, and on which devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config.fields import Section, number, shown


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of a model, which determines what its parameters mean: the fields that every family has.

    Each family has its own section, a subclass whose default of `family` is the family's name. Defining the subclass
    registers it (`model_section`). `models.families` holds the code that computes the models.
    """

    # Mesh axes over which the family cannot be split, with the reasons.
    WHOLE: ClassVar[Mapping[str, str]] = {}
    # Fields on which no parameter depends: they may differ from those of the model that training starts from.
    MAY_DIFFER: ClassVar[frozenset[str]] = frozenset({"context", "dropout"})

    family: str = ""
    vocab_size: int = number(32768, low=1)
    width: int = number(768, low=1)  # D, the width of the hidden states from which logits and scores are computed
    context: int = number(2048, low=1)  # the longest sequence the model is trained and evaluated at
    dropout: float = number(0.0, low=0, below=1)

    def parameter_count(self) -> int:
        """The number of parameters, computed from the fields without building the model."""
        raise NotImplementedError(f"{type(self).__name__} does not count its parameters")

    def summary(self) -> str:
        """The shape on one line, for the table that is printed when a run starts."""
        raise NotImplementedError(f"{type(self).__name__} does not describe its shape")

    def may_differ(self) -> frozenset[str]:
        """The fields of MAY_DIFFER that hold for this shape."""
        return self.MAY_DIFFER

    def divided(self) -> Mapping[str, Mapping[str, int]]:
        """By mesh axis, the numbers of this section that the size of the axis has to divide, by their names."""
        return {}


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The shape of an attention layer."""

    width: int
    heads: int  # query heads
    kv_heads: int
    head_size: int
    rope_theta: float | None  # None: queries and keys are not rotated
    window: int  # 0: the whole document
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The shape of a decoder: SmallCoder (in the style of Llama), the staged sizes and GPT-2."""

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
        """Computed from the fields; a test compares it with the model itself."""
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

    def attention(self) -> AttentionShape:
        return AttentionShape(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            rope_theta=self.rope_theta if self.positions == "rope" else None,
            window=self.window,
            bias=self.bias == "all",
        )

    def divided(self) -> Mapping[str, Mapping[str, int]]:
        return {
            "tensor": {name: getattr(self, name) for name in ("kv_heads", "mlp_width", "vocab_size")},
            "fsdp": {"width": self.width},
        }

    def summary(self) -> str:
        return (
            f"width {self.width}, layers {self.layers}, heads {self.heads}:{self.kv_heads} x {self.head_size}, "
            f"MLP {self.mlp_width}, vocabulary {self.vocab_size}"
        )

    def may_differ(self) -> frozenset[str]:
        """Without `context` for learned positions, whose table has one row per position of the context."""
        return self.MAY_DIFFER - ({"context"} if self.positions == "learned" else set())


def model_section(family: Any) -> type[ModelConfig]:
    """The section of the model family with this name. Raises UserError for an unknown family."""
    known = {cls.family: cls for cls in ModelConfig.__subclasses__()}
    if not isinstance(family, str) or family not in known:
        raise UserError(f"model.family={shown(family)}: expected one of {', '.join(map(repr, sorted(known)))}")
    return known[family]


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Section):
    """How the model is computed. Apart from rounding, none of these settings changes the results."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products; parameters are float32
    # Products of float32 arrays in training and evaluation. exact: in float32. mixed: inputs rounded to bfloat16, sums
    # in float32; twice as fast on CPUs with bfloat16 instructions. auto: mixed on such CPUs, exact elsewhere. Decoding
    # is always exact.
    matmul: Literal["exact", "mixed", "auto"] = "exact"
    attention: Literal["auto", "xla", "cudnn", "pallas_tpu", "pallas_gpu"] = "auto"
    recurrence: Literal["auto", "xla", "pallas_tpu", "pallas_gpu"] = "auto"  # of the byte-level family
    layers: Literal["scan", "unroll"] = "unroll"  # scan compiles faster, unroll runs faster
    # What the backward pass recomputes: nothing (none), all but products with parameters (dots), or everything (full).
    remat: Literal["none", "dots", "full"] = "none"

    def problems(self) -> Iterator[str]:
        if self.matmul == "mixed" and self.dtype != "float32":
            yield (
                f"compute.matmul='mixed' is of float32 products, and with compute.dtype={self.dtype!r} there are none; "
                "set compute.dtype to float32, or leave compute.matmul at auto"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """The number of devices along each axis. One axis may be -1, which means all remaining devices."""

    data: int = number(-1, low=-1)  # batch split, parameters replicated
    fsdp: int = number(1, low=-1)  # batch split, parameters and optimizer split
    context: int = number(
        1, low=-1
    )  # rows split along their length, keys gathered for attention; parameters replicated
    tensor: int = number(1, low=-1)  # heads and MLP width split
