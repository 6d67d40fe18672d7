"""Small things that many tests need."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax.config import (
    ComputeConfig,
    Config,
    DecoderConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

FLOAT32 = ComputeConfig(dtype="float32")
# For tests that compile a function of their own around their arrays. Elsewhere a captured array fails the test
# (conftest.py): on a device a captured mask costs minutes of compiling.
CAPTURES = pytest.mark.filterwarnings("ignore:A large amount of constants")


def tiny_model(**changes: Any) -> DecoderConfig:
    """A model of every option's default kind that runs in milliseconds."""
    shape = DecoderConfig(
        vocab_size=97, width=64, mlp_width=96, layers=2, heads=4, kv_heads=2, head_size=16, context=64
    )
    return dataclasses.replace(shape, **changes)


def tiny_config(**changes: Any) -> Config:
    config = Config(
        name="tiny",
        model=tiny_model(),
        compute=FLOAT32,
        train=TrainConfig(steps=10, batch_size=8, sequence_length=32, log_every=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.01),
        eval=EvalConfig(sample_tokens=16),
    )
    return dataclasses.replace(config, **changes)


def packed_batch(model: ModelConfig, rows: int, length: int, seed: int, cuts: int = 3) -> dict[str, np.ndarray]:
    """Rows of random documents: each row has `cuts` borders and some padding at its end."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, model.vocab_size, (rows, length + 1)).astype(np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        filled = length - int(generator.integers(0, length // 8 + 1))
        borders = [0, *sorted(generator.choice(np.arange(1, filled), cuts, replace=False)), filled]
        for segment, (start, stop) in enumerate(itertools.pairwise(borders), 1):
            segment_ids[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_weights": (segment_ids > 0).astype(np.float32),
    }


def max_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees of arrays of one structure."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)
