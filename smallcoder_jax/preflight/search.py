"""Finds the largest number of rows that fits with few compilations: extrapolates linearly, then tries the result."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

TRIALS = 8  # compilations, at most
SECONDS = 100.0  # no trial is started that, if as slow as the slowest so far, would end later than this


@dataclasses.dataclass(frozen=True)
class Trial:
    """A compiled step of `rows` rows per microbatch and device. `peak` is its memory in bytes per device; None when the
    compiler refused the step and did not report it.
    """

    rows: int
    peak: float | None
    fits: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Largest:
    """The result of the search, in rows per microbatch and device.

    `rows` is the largest number with which a compiled step fits, 0 if none does. `estimate` is the extrapolated largest
    number, when there was no time for more trials. `too_many` is the smallest number that does not fit.
    """

    rows: int
    estimate: int | None
    too_many: int | None
    compilations: int


def largest_rows(first: Trial, attempt: Callable[[int], Trial], memory: float, fixed: float) -> Largest:
    """Searches for the largest number of rows. `fixed` is the estimated memory in bytes that does not depend on the
    rows; it is used until there is a second trial.
    """
    start = time.monotonic() - first.seconds
    trials = [first]
    while True:
        low = max((trial.rows for trial in trials if trial.fits), default=0)
        high = min((trial.rows for trial in trials if not trial.fits), default=None)
        guess = _predict(trials, memory, fixed)
        if high is not None:
            guess = min(guess, high - 1)
        if guess <= low and not (low == 0 and high is not None and high > 1):
            break  # the next number does not fit: it was tried, or the line through two trials says so
        if low and len(trials) > 1 and guess - low <= low // 50:
            break  # close enough
        guess = max(guess, 1)
        slowest = max(trial.seconds for trial in trials)
        if len(trials) == TRIALS or time.monotonic() - start + slowest > SECONDS:
            return Largest(low, guess, high, len(trials))
        trials.append(attempt(guess))
    return Largest(low, None, high, len(trials))


def _predict(trials: list[Trial], memory: float, fixed: float) -> int:
    """The rows whose peak is `memory`, on the line through the two trials of most rows, or through `fixed` and one."""
    known = sorted((trial.rows, trial.peak) for trial in trials if trial.peak is not None)
    if not known:
        return min(trial.rows for trial in trials) // 2
    rows, peak = known[-1]
    other_rows, other_peak = known[-2] if len(known) > 1 else (0, min(fixed, peak))
    slope = (peak - other_peak) / (rows - other_rows)
    if slope <= 0:
        return rows * 2
    return math.floor(rows + (memory - peak) / slope)
