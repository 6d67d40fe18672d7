"""What both sides of `tools.bench.step` share: the batches, the clock, and the process's memory and cores."""

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
BATCHES = 4  # different ones, in turns


def random_batches(config: Config, documents: int | None) -> list[dict[str, np.ndarray]]:
    """Full rows of random tokens, of one document (None) or of documents of `documents` tokens on average; the same for
    all contenders.
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
    """Share of a whole row's causal pairs of tokens that documents leave, over the batches."""
    length = config.train.sequence_length
    pairs = [packed_rows.visible_pairs(batch["segment_ids"]) for batch in random_batches(config, documents)]
    return sum(pairs) / (BATCHES * config.train.batch_size * length * (length + 1) // 2)


def timed(run: Callable[[int], float], steps: int) -> tuple[list[float], float]:
    """Seconds of each of `steps` steps, and the last one's loss. `run` returns when its step is done."""
    seconds, loss = [], 0.0
    for number in range(WARMUP_STEPS + steps):
        start = time.perf_counter()
        loss = run(number)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:], loss


def resident_set() -> int:
    """Bytes of the largest resident set that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, the others in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
