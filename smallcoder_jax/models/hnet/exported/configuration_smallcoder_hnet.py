"""The settings of a byte-level model that SmallCoder JAX exported: the fields of its config.json."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class SmallcoderHnetConfig(PretrainedConfig):
    """The shape of an H-Net (arXiv 2507.07955) of recurrent blocks.

    `width` and `inner_widths` are the widths of the stages, outermost first. Each stage but the innermost has
    `encoder_blocks` before and `decoder_blocks` after the stage within it; the innermost has `blocks`, whose kinds
    repeat `pattern` (x: recurrence, a: attention). `ternary` says of each stage whether its weights are -1, 0 and 1.
    `packed` says that these are stored four to a byte. The other fields are those of the blocks.
    """

    model_type: ClassVar = "smallcoder_hnet"
    attribute_map: ClassVar = {"hidden_size": "width", "max_position_embeddings": "context"}

    def __init__(
        self,
        vocab_size: int = 256,
        context: int = 2048,
        width: int = 256,
        inner_widths: list[int] | None = None,
        encoder_blocks: list[int] | None = None,
        decoder_blocks: list[int] | None = None,
        blocks: int = 6,
        ternary: list[bool] | None = None,
        packed: bool = False,
        expand_ratio: int = 1,
        conv_size: int = 0,
        conv: str = "shared",
        pattern: str = "x",
        heads: int = 4,
        kv_heads: int = 4,
        window: int = 128,
        rope_theta: float = 10_000.0,
        use_cache: bool = True,
        **others: Any,
    ):
        self.vocab_size, self.context, self.width = vocab_size, context, width
        self.inner_widths = inner_widths or []
        self.encoder_blocks, self.decoder_blocks, self.blocks = encoder_blocks or [], decoder_blocks or [], blocks
        self.ternary = ternary or [True] * (1 + len(self.inner_widths))
        self.packed = packed
        self.expand_ratio, self.conv_size, self.conv = expand_ratio, conv_size, conv
        self.pattern, self.heads, self.kv_heads = pattern, heads, kv_heads
        self.window, self.rope_theta, self.use_cache = window, rope_theta, use_cache
        super().__init__(**{"tie_word_embeddings": False, **others})

    @property
    def widths(self) -> list[int]:
        """Of all stages, outermost first."""
        return [self.width, *self.inner_widths]

    @property
    def num_hidden_layers(self) -> int:
        return self.blocks + sum(self.encoder_blocks) + sum(self.decoder_blocks)
