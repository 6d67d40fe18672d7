"""The computational cost of a byte-level model."""

from __future__ import annotations

from smallcoder_jax.config import HnetConfig
from smallcoder_jax.config.hnet import mlp_width


def flops_per_token(model: HnetConfig, sequence_length: int) -> float:
    """FLOPs of one training step per byte: 6 per parameter of a matrix, and attention as for a decoder. The blocks
    within a stage count once for each chunk of the target length; the room for more chunks that a row has is not
    counted, because nothing has to be computed there.
    """
    total, share = float(model.vocab_size * model.width), 1.0
    for stage, width in enumerate(model.widths):
        innermost = stage == len(model.inner_widths)
        blocks = model.blocks if innermost else model.encoder_blocks[stage] + model.decoder_blocks[stage]
        attentions = model.kinds.count("a") if innermost else 0
        shape = model.attention()
        total += share * (
            (blocks - attentions) * 4 * width**2 * model.expand_ratio
            + attentions * _attention(shape.width, shape.heads, shape.kv_heads, shape.head_size)
            + attentions * 2 * shape.heads * shape.head_size * _seen(model, sequence_length * share)
            + blocks * 3 * width * mlp_width(width)
            + (0 if innermost else 3 * width**2)
        )
        share /= model.chunk_target
    return 6.0 * total


def _attention(width: int, heads: int, kv_heads: int, head_size: int) -> int:
    return 2 * width * head_size * (heads + kv_heads)


def _seen(model: HnetConfig, chunks: float) -> float:
    """The chunks that a chunk attends to, on average over a row of one long document."""
    return min(model.window, chunks / 2) if model.window else chunks / 2
