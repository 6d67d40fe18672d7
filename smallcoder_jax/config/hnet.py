"""The shape of a byte-level model: recurrent blocks, ternary or not, flat or in stages of learned chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from smallcoder_jax.config.fields import number
from smallcoder_jax.config.model import AttentionShape, ModelConfig


@dataclasses.dataclass(frozen=True)
class HnetConfig(ModelConfig):
    """The shape of an H-Net (arXiv 2507.07955) of recurrent blocks. Each stage but the innermost has blocks before and
    after the stage within it. Without `inner_widths` there is only one stage: the model is flat.
    """

    WHOLE: ClassVar[Mapping[str, str]] = {"context": "a recurrence and chunks run along the whole row"}
    MAY_DIFFER: ClassVar[frozenset[str]] = frozenset(
        {"context", "ratio_weight", "chunk_target", "capacity", "stage_rates", "window"}
    )

    family: Literal["hnet"] = "hnet"
    vocab_size: int = number(256, low=1)
    width: int = number(256, low=1)  # of the outermost stage
    inner_widths: tuple[int, ...] = ()  # of the stages within, outermost first, each at least as wide as the one before
    encoder_blocks: tuple[int, ...] = ()  # blocks before each stage within
    decoder_blocks: tuple[int, ...] = ()  # blocks after each stage within
    blocks: int = number(6, low=1, high=10_000)  # of the innermost stage
    ternary: tuple[bool, ...] = ()  # whether the weights of each stage are ternary, outermost first; (): those of all

    # The recurrence.
    expand_ratio: int = number(1, low=1, high=64)  # width of the recurrence, as a multiple of the stage's width
    conv_size: int = number(0, low=0, high=64, zero="no convolution")  # positions that the short convolution sees
    conv: Literal["shared", "separate"] = "shared"  # of the input, or of the forget gate and the value, one each

    # The innermost stage's blocks: a pattern of x (recurrence) and a (attention), repeated where it is shorter.
    pattern: str = "x"
    heads: int = number(4, low=1)  # query heads of attention; the gates of a recurrence are elementwise and have none
    kv_heads: int = number(4, low=1)
    window: int = number(128, low=0, zero="the whole document")  # of attention, in chunks
    rope_theta: float = number(10_000.0, above=0)

    # Chunks.
    chunk_target: float = number(6.0, above=1)  # positions in a chunk on average, in each stage
    ratio_weight: float = number(0.03, low=0)  # of the ratio loss that leads there
    capacity: float = number(2.0, low=1)  # room for chunks in training, as a multiple of their number at the target
    stage_rates: tuple[float, ...] = ()  # multipliers of the learning rate, outermost stage first; (): 1 for all

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all stages, outermost first."""
        return (self.width, *self.inner_widths)

    @property
    def kinds(self) -> str:
        """The innermost stage's blocks, one letter each."""
        return (self.pattern * self.blocks)[: self.blocks]

    def room(self, length: int) -> int:
        """How many chunks a row of `length` positions has room for in training, in whole tiles of 128."""
        return min(length, 128 * math.ceil(length * self.capacity / self.chunk_target / 128))

    def is_ternary(self, stage: int) -> bool:
        return self.ternary[stage] if self.ternary else True

    def attention(self) -> AttentionShape:
        """The shape of the attention in the innermost stage."""
        width = self.widths[-1]
        return AttentionShape(
            width=width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=width // self.heads,
            rope_theta=self.rope_theta,
            window=self.window,
        )

    def divided(self) -> Mapping[str, Mapping[str, int]]:
        attention = {"heads": self.heads, "kv_heads": self.kv_heads} if "a" in self.kinds else {}
        named = {"width": self.width, **{f"inner_widths[{i}]": width for i, width in enumerate(self.inner_widths)}}
        return {"tensor": {"vocab_size": self.vocab_size, **named, **attention}, "fsdp": named}

    def problems(self) -> Iterator[str]:
        within = len(self.inner_widths)
        for name in ("encoder_blocks", "decoder_blocks"):
            found = getattr(self, name)
            if len(found) != within or any(count < 1 for count in found):
                yield f"model.{name}={found} must have {within} positive numbers, one for each of model.inner_widths"
        if list(self.widths) != sorted(self.widths):
            yield f"model.inner_widths={self.inner_widths} must grow from model.width={self.width}"
        if self.ternary and len(self.ternary) != within + 1:
            yield f"model.ternary={self.ternary} must have {within + 1} values, one for each stage"
        if self.stage_rates and (len(self.stage_rates) != within + 1 or any(rate <= 0 for rate in self.stage_rates)):
            yield f"model.stage_rates={self.stage_rates} must have {within + 1} positive numbers, one for each stage"
        if not self.pattern or set(self.pattern) - set("xa"):
            yield f"model.pattern={self.pattern!r} must consist of x (recurrence) and a (attention)"
        elif "a" in self.kinds:
            if self.widths[-1] % (2 * self.heads):
                yield f"the innermost width, {self.widths[-1]}, must be a multiple of twice model.heads={self.heads}"
            if self.heads % self.kv_heads:
                yield f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}"
        if self.dropout:
            yield f"model.dropout={self.dropout}: this family has no dropout; set it to 0"

    def parameter_count(self) -> int:
        """Computed from the fields; a test compares it with the model itself."""
        count = 2 * self.vocab_size * self.width + (self.width if self.is_ternary(0) else 0)  # table, head, its gain
        for stage, width in enumerate(self.widths):
            innermost = stage == len(self.inner_widths)
            stacks = (self.blocks,) if innermost else (self.encoder_blocks[stage], self.decoder_blocks[stage])
            attentions = self.kinds.count("a") if innermost else 0
            mixers = (sum(stacks) - attentions) * self._recurrence_count(stage) + attentions * self._attention_count()
            count += mixers + sum(stacks) * (self._mlp_count(stage) + 2 * width) + len(stacks) * width
            if not innermost:
                count += 3 * width**2 + width + self.widths[stage + 1] - width  # router, residual, wider vector
        return count

    def _recurrence_count(self, stage: int) -> int:
        width, expanded = self.widths[stage], self.widths[stage] * self.expand_ratio
        gains = 3 * width + expanded if self.is_ternary(stage) else 0
        convolved = width if self.conv == "shared" else 2 * expanded
        return 4 * width * expanded + gains + expanded + self.conv_size * convolved

    def _attention_count(self) -> int:
        shape = self.attention()
        return 2 * shape.width * shape.head_size * (shape.heads + shape.kv_heads)

    def _mlp_count(self, stage: int) -> int:
        width, hidden = self.widths[stage], mlp_width(self.widths[stage])
        return 3 * width * hidden + (width + hidden if self.is_ternary(stage) else 0)

    def summary(self) -> str:
        stages = [
            f"{before}+{after} blocks of width {width}"
            for before, after, width in zip(self.encoder_blocks, self.decoder_blocks, self.widths, strict=False)
        ]
        kinds = f" ({self.kinds}, {self.heads}:{self.kv_heads} heads)" if "a" in self.kinds else ""
        plural = "" if self.blocks == 1 else "s"
        stages.append(f"{self.blocks} block{plural} of width {self.widths[-1]}{kinds}")
        ternary = [self.is_ternary(stage) for stage in range(len(self.widths))]
        weights = "ternary" if all(ternary) else "float" if not any(ternary) else f"ternary by stage: {ternary}"
        unused = (
            ""
            if "a" in self.kinds or self.heads == HnetConfig.heads
            else f"; heads {self.heads} (no effect: no attention)"
        )
        return f"{'; '.join(stages)}; vocabulary {self.vocab_size}; weights {weights}{unused}"


def mlp_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256."""
    return 256 * -(-(8 * width // 3) // 256)
