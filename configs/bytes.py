"""One table of the byte-level variants: no tokenizer, ternary weights, a recurrence in place of attention.

Command:   python -m smallcoder_jax.main --config=byte_nano --workdir=runs/byte_nano
           (--config=configs/byte_nano.py and --config=configs/bytes.py:byte_nano mean the same)
Hardware, time, expected: in the docstring of each variant's own file.

A flat model computes every byte in every block. A model in stages learns to divide the text into chunks, and its inner
stages compute one state for each chunk (H-Net, arXiv 2507.07955).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import default_config


class Shape(NamedTuple):
    """The widths of the stages, outermost first, and the blocks before, after and, in the innermost stage, within."""

    widths: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    blocks: int
    steps: int = 10_000
    warmup_steps: int = 500


VARIANTS = {
    "byte_flat":        Shape((512,), (), (), 6),
    "byte_1stage":      Shape((256, 384), (4,), (4,), 8, 15_000, 750),
    "byte_2stage":      Shape((512, 768, 1024), (4, 4), (4, 4), 8, 20_000, 1000),
    "byte_75m":         Shape((384, 512, 768), (3, 3), (3, 3), 6, 20_000, 1000),
    "byte_100m":        Shape((576, 768), (4,), (4,), 10, 15_000, 750),
    "byte_350m":        Shape((640, 896, 1152), (4, 4), (4, 4), 12, 20_000, 1000),
    "byte_smallcoder":  Shape((512, 768), (4,), (4,), 12, 20_000, 1000),
    "byte_nano":        Shape((128,), (), (), 4, 1600, 20),
    "byte_nano_1stage": Shape((128, 192), (1,), (1,), 1, 2000, 20),
}  # fmt: skip
STAGE_RATES = {1: (), 2: (1.5, 1.0), 3: (2.0, 1.5, 1.0)}  # by number of stages


def get_config(variant: str = "byte_nano") -> ConfigDict:
    """The config of a variant. Raises UserError for a variant that is not in the table."""
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    shape, config = VARIANTS[variant], default_config("hnet")
    config.name = variant.replace("_", "-")
    config.model.update(
        width=shape.widths[0],
        inner_widths=shape.widths[1:],
        encoder_blocks=shape.encoder_blocks,
        decoder_blocks=shape.decoder_blocks,
        blocks=shape.blocks,
        stage_rates=STAGE_RATES[len(shape.widths)],
        chunk_target=2.5,
        ratio_weight=0.05 if len(shape.widths) == 3 else 0.03,
        context=512,
    )
    config.tokenizer.kind = "bytes"
    config.data.update(sources="hf:roneneldan/TinyStories!nofim", fim_rate=0.0)
    config.train.update(steps=shape.steps, batch_size=64, sequence_length=512, microbatch_size=16)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=shape.warmup_steps, weight_decay=0.01)
    config.eval.update(every=500, batches=16, sample_tokens=150)
    if variant in ("byte_100m", "byte_350m"):
        config.model.update(expand_ratio=2, conv_size=4)
    if variant == "byte_smallcoder":
        _smallcoder(config)
    if variant.startswith("byte_nano"):
        _nano(config)
    return config


def _smallcoder(config: Any) -> None:
    """SmallCoder's blocks on chunks, between recurrences on bytes, all in full precision, trained on code."""
    config.model.update(
        ternary=(False, False), pattern="a", heads=6, kv_heads=2, window=0, chunk_target=6.0, conv_size=4, context=8192
    )
    config.data.update(sources="hf:bigcode/the-stack-smol", fim_rate=0.5)
    config.train.update(batch_size=32, sequence_length=8192, microbatch_size=8)
    config.eval.update(batches=4)


def _nano(config: Any) -> None:
    config.compute.update(dtype="float32", matmul="auto")
    config.model.update(chunk_target=4.0, ratio_weight=0.1, context=2048)
    config.data.update(sources="stdlib")
    config.train.update(batch_size=1, sequence_length=2048, microbatch_size=0, log_every=50)
    config.optimizer.update(
        name="muon",
        learning_rate=0.01,  # for the embedding and the norms
        muon_learning_rate=0.03,
        weight_decay=0.1,
        schedule="linear",
        final_ratio=0.0,
    )
    config.eval.update(every=400, batches=8, batch_size=8, sample_tokens=100, sample_temperature=0.0)
    config.eval.sample_prompts = ("def read_lines(path):\n    with open(",)
    config.checkpoint.update(every=400, keep=2)
    config.log.update(charts_every=0)
