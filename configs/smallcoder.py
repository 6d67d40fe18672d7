"""One table of all variants, the models that have their own config file in this folder.

Command:   python -m smallcoder_jax.main --config=medium_lc --workdir=runs/medium_lc
           (--config=configs/medium_lc.py and --config=configs/smallcoder.py:medium_lc mean the same)
Hardware, time, expected: in the docstring of each variant's own file.

The SmallCoders are decoders with RoPE, RMSNorm, SwiGLU and grouped heads; the `_lc` variants have a long context. The
staged variants are decoders with RoPE, RMSNorm, GELU and biases. nano is the model of the quick start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import default_config


class Shape(NamedTuple):
    """The sizes of a decoder, and the size of its training batches."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    batch_size: int  # rows of `context` tokens


VARIANTS = {
    #                  width  MLP  layers heads KV context batch
    "tiny":         Shape(768, 2048, 12, 6, 2, 2048, 128),
    "tiny_lc":      Shape(768, 2048, 12, 6, 2, 8192, 32),
    "small":        Shape(1024, 2432, 16, 8, 2, 4096, 64),
    "small_lc":     Shape(1024, 2432, 16, 8, 2, 8192, 32),
    "medium":       Shape(1024, 2816, 24, 8, 2, 4096, 64),
    "medium_lc":    Shape(1024, 2816, 24, 8, 2, 8192, 32),
    "staged_tiny":   Shape(256, 1024, 4, 4, 4, 512, 64),
    "staged_medium": Shape(768, 3072, 12, 12, 12, 1024, 32),
    "staged_large":  Shape(1600, 6400, 32, 25, 25, 4096, 64),
    "staged_xlarge": Shape(2048, 8192, 40, 32, 32, 8192, 64),
    "nano":         Shape(192, 512, 4, 3, 1, 512, 3),
}  # fmt: skip


def get_config(variant: str = "medium_lc") -> ConfigDict:
    """The config of a variant. Raises UserError for a variant that is not in the table."""
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    shape, config = VARIANTS[variant], default_config()
    family = "staged" if variant.startswith("staged") else "smallcoder"
    config.name = f"{family}-{variant.removeprefix('staged_').replace('_', '-')}"
    config.model.update({name: value for name, value in shape._asdict().items() if name != "batch_size"})
    config.train.update(steps=20_000, batch_size=shape.batch_size, sequence_length=shape.context, microbatch_size=8)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.eval.update(batches=16)
    if variant == "nano":
        _nano(config)
    elif family == "staged":
        _staged(config)
    else:
        config.model.update(vocab_size=32768, head_size=128, rope_theta=10_000.0)
        if variant.endswith("_lc"):
            _long_context(config)
    return config


def _long_context(config: Any) -> None:
    config.model.rope_theta = 500_000.0
    config.eval.update(batches=4)
    config.compute.update(layers="scan", remat="full")
    config.data.repository_order = True


def _staged(config: Any) -> None:
    config.model.update(vocab_size=32000, head_size=64, mlp="gelu", bias="all")
    if config.model.width < 1024:
        config.train.microbatch_size = 0
    else:
        config.mesh.update(data=1, fsdp=-1)  # one device cannot hold parameters, optimizer and activations together
        config.compute.remat = "full"


def _nano(config: Any) -> None:
    config.model.update(vocab_size=2048, head_size=64)
    config.compute.update(dtype="float32", matmul="auto")  # bfloat16 activations are slower on a CPU
    config.data.update(sources="stdlib", fim_rate=0.1)
    # Many small steps: at this size more steps improve the loss more than larger batches.
    config.train.update(steps=2200, sequence_length=384, microbatch_size=0, log_every=50)
    config.optimizer.update(
        name="muon",
        learning_rate=0.01,  # for the embedding and the norms
        muon_learning_rate=0.03,
        weight_decay=0.1,
        schedule="linear",
        warmup_steps=20,
        final_ratio=0.0,
    )
    # Frequent, so that the samples visibly improve during the run.
    config.eval.update(every=400, batches=4, batch_size=16, sample_tokens=48, sample_temperature=0.0)
    config.eval.sample_prompts = ("def read_lines(path):\n    with open(",)
    config.checkpoint.update(every=400, keep=2)
    config.log.update(charts_every=0)
