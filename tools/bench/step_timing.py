"""Shared by both sides of `tools.bench.step`: the batches, timing, and the memory and cores of the process."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from smallcoder_jax.config import Config
from tools.bench import packed_rows

WARMUP_STEPS = 2  # not timed
BATCHES = 4  # different batches, used in turns


def random_batches(config: Config, documents: int | None) -> list[dict[str, np.ndarray]]:
    """Full rows of random tokens: one document per row (None), or documents of `documents` tokens on average. They are
    the same for all contenders.
    """
    generator = np.random.default_rng(config.train.seed)
    shape = (config.train.batch_size, config.train.sequence_length)
    batches = []
    for _ in range(BATCHES):
        ids = generator.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
        segments = packed_rows.segment_ids(*shape, documents, generator)
        batches.append(
            {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "positions": packed_rows.positions(segments),
                "segment_ids": segments,
                "loss_weights": np.ones(shape, np.float32),
            }
        )
    return batches


def visible_share(config: Config, documents: int | None) -> float:
    """The share of a row's causal pairs of tokens that are in the same document, over all batches."""
    length = config.train.sequence_length
    pairs = [packed_rows.visible_pairs(batch["segment_ids"]) for batch in random_batches(config, documents)]
    return sum(pairs) / (BATCHES * config.train.batch_size * length * (length + 1) // 2)


def timed(run: Callable[[int], float], steps: int) -> tuple[list[float], float]:
    """Seconds of each of `steps` steps, and the loss of the last one. `run` returns when its step is done."""
    seconds, loss = [], 0.0
    for number in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        loss = run(number)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:], loss


def resident_set() -> int:
    """The largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, other systems in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
