"""Rows of packed documents for benchmarks, the work of attention over them, and timing.

Needs numpy only, so that programs of any framework can use it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

SPREAD = 1.0  # standard deviation of the logarithm of document lengths: most are short, a few are long
WINDOW_SECONDS, WINDOWS = 0.05, 7  # each window times many calls together
THETA = 500_000.0  # of RoPE
BOUND = 2e-2  # largest relative error of attention with bf16 inputs
GRADIENTS = ("output", "dq", "dk", "dv")
ALL = ("forward", "backward", "both")
PER_PAIR = dict(zip(ALL, (4, 10, 14), strict=True))  # FLOPs per head dimension: 2, 5 and 7 matrix products


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention: `rows` of `length` tokens with documents of `mean` tokens, or with one document each (None)."""

    rows: int
    length: int
    mean: int | None
    heads: int
    kv_heads: int
    size: int

    @property
    def documents(self) -> str:
        return "one" if self.mean is None else f"mean {self.mean}"

    def segment_ids(self) -> np.ndarray:
        """Document numbers, [rows, length], the same at every call."""
        generator = np.random.default_rng([self.length, self.mean or 0])
        return segment_ids(self.rows, self.length, self.mean, generator)

    def inputs(self) -> tuple[np.ndarray, ...]:
        """Random float32 q, k, v and gradient of the output, [rows, length, heads, size], the same at every call."""
        generator = np.random.default_rng([self.length, self.size])
        return tuple(
            generator.standard_normal((self.rows, self.length, heads, self.size), np.float32)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )

    def flops(self) -> dict[str, int]:
        """Useful FLOPs of each pass, which count only the pairs that causality and documents allow."""
        pairs = visible_pairs(self.segment_ids())
        return {name: per_pair * pairs * self.heads * self.size for name, per_pair in PER_PAIR.items()}


def document_lengths(length: int, mean: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths of the documents that fill a row of `length`, log-normally distributed, `mean` on average in every
    row."""
    count = max(1, round(length / mean))
    shares = generator.lognormal(0.0, SPREAD, count)
    borders = np.round(np.cumsum(shares) / shares.sum() * (length - count)).astype(np.int64)
    return np.diff(borders, prepend=0) + 1  # none is empty


def segment_ids(rows: int, length: int, mean: int | None, generator: np.random.Generator) -> np.ndarray:
    """The number of each token's document, from 1: int32 [rows, length]. `mean=None`: one document per row."""
    if mean is None:
        return np.ones((rows, length), np.int32)
    per_row = [document_lengths(length, mean, generator) for _ in range(rows)]
    return np.stack([np.repeat(np.arange(1, len(x) + 1, dtype=np.int32), x) for x in per_row])


def document_borders(segments: np.ndarray) -> list[list[int]]:
    """For each row, the starts of its documents and the row's length: [0, ..., length]."""
    return [[0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)] for row in segments]


def positions(segments: np.ndarray) -> np.ndarray:
    """The position of each token in its document: int32, like `segments`."""
    rows = [np.concatenate([np.arange(n) for n in np.diff(borders)]) for borders in document_borders(segments)]
    return np.stack(rows).astype(np.int32)


def visible_pairs(segments: np.ndarray) -> int:
    """The number of pairs of a query and a key at or before it in the same document, over all rows."""
    lengths = itertools.chain.from_iterable(np.diff(borders) for borders in document_borders(segments))
    return sum(int(n) * (int(n) + 1) // 2 for n in lengths)


def rotation(shape: Shape, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the positions' angles, float32 [rows, length, size / 2]."""
    frequencies = theta ** (-np.arange(0, shape.size, 2) / shape.size)
    angles = positions(shape.segment_ids())[:, :, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference divided by the largest entry; infinite if any entry is not finite."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over windows of the seconds per call. As in training, calls follow each other without waiting for each
    result; `wait` returns when the device has finished what `call` returned.
    """
    wait(call())  # compiled and warm

    def window(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()
        wait(result)
        return time.perf_counter() - start

    calls = max(1, round(WINDOW_SECONDS / max(window(3) / 3, 1e-7)))
    return statistics.median(window(calls) / calls for _ in range(WINDOWS))


def named(contenders: Sequence[T], wanted: Sequence[str]) -> list[T]:
    """The contenders whose name contains one of the words `wanted`, or all if it is empty."""
    return [one for one in contenders if not wanted or any(word in one.name for word in wanted)]


def failure(error: Exception) -> str:
    """An exception as one cell of a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:160]}"
