"""The largest microbatch is found in few compilations, and is never one that does not fit."""

from __future__ import annotations

import pytest

from smallcoder_jax.preflight import search
from smallcoder_jax.preflight.search import Largest, Trial, largest_rows


class Machine:
    """Where a step of `rows` rows takes fixed + slope * rows + curve * rows^2 bytes."""

    def __init__(self, fixed: float, slope: float, memory: float, curve: float = 0.0, says: bool = True):
        self.fixed, self.slope, self.memory, self.curve, self.says = fixed, slope, memory, curve, says
        self.tried: list[int] = []

    def attempt(self, rows: int) -> Trial:
        self.tried.append(rows)
        peak = self.fixed + self.slope * rows + self.curve * rows**2
        fits = peak <= self.memory
        return Trial(rows, peak if fits or self.says else None, fits, seconds=1.0)

    def largest(self, first: int, fixed: float | None = None) -> Largest:
        return largest_rows(self.attempt(first), self.attempt, self.memory, self.fixed if fixed is None else fixed)


def test_one_more_compilation_where_memory_is_linear() -> None:
    machine = Machine(fixed=100, slope=10, memory=255)
    assert machine.largest(4) == Largest(15, None, None, 2)
    assert machine.tried == [4, 15]


def test_a_wrong_guess_is_corrected() -> None:
    machine = Machine(fixed=100, slope=10, memory=260, curve=0.5)
    largest = machine.largest(2, fixed=20)
    assert largest.rows == 10
    assert largest.estimate is None
    assert 100 + 10 * 11 + 0.5 * 11**2 > 260


@pytest.mark.parametrize("says", [True, False])
def test_from_one_that_does_not_fit_downwards(says: bool) -> None:
    largest = Machine(fixed=100, slope=40, memory=255, says=says).largest(16)
    assert (largest.rows, largest.estimate) == (3, None)
    assert largest.too_many is not None


@pytest.mark.parametrize("says", [True, False])
def test_not_even_one_row(says: bool) -> None:
    largest = Machine(fixed=300, slope=40, memory=255, says=says).largest(4)
    assert largest.rows == 0
    assert largest.estimate is None
    assert largest.too_many == 1


def test_where_time_is_short_it_says_that_it_is_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SECONDS", 1.5)
    machine = Machine(fixed=100, slope=10, memory=255)
    assert machine.largest(4) == Largest(4, 15, None, 1)
    assert machine.tried == [4]
