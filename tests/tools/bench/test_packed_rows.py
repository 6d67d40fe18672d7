"""Documents of benchmark rows, and the count of the work that they leave, against a count pair by pair."""

import numpy as np
import pytest

from tools.bench import packed_rows
from tools.bench.packed_rows import Shape


@pytest.mark.parametrize(("length", "mean"), [(512, 64), (300, 100), (64, 1), (100, 90)])
def test_documents_fill_rows_and_have_the_mean_that_was_asked_for(length: int, mean: int) -> None:
    segments = packed_rows.segment_ids(5, length, mean, np.random.default_rng(0))
    assert segments.shape == (5, length)
    for row in segments:
        assert set(np.diff(row)) <= {0, 1}
        assert row[0] == 1
        assert row[-1] == round(length / mean)
    if mean > 1:
        assert len({tuple(row) for row in segments}) > (length == 512)


def test_the_same_rows_are_drawn_at_every_call_and_lengths_are_spread() -> None:
    shape = Shape(2, 4096, 256, 4, 2, 8)
    assert np.array_equal(shape.segment_ids(), shape.segment_ids())
    assert all(np.array_equal(a, b) for a, b in zip(shape.inputs(), shape.inputs(), strict=True))
    lengths = np.concatenate([np.diff(borders) for borders in packed_rows.document_borders(shape.segment_ids())])
    assert lengths.max() > 4 * np.median(lengths)


@pytest.mark.parametrize("mean", [None, 1, 7, 30])
def test_flops_equal_a_count_pair_by_pair(mean: int | None) -> None:
    shape = Shape(3, 61, mean, 6, 2, 16)
    segments = shape.segment_ids()
    pairs = sum(
        segments[b, t] == segments[b, s] and s <= t for b in range(3) for t in range(61) for s in range(61)
    )  # fmt: skip
    per_product = 2 * pairs * shape.heads * shape.size
    assert shape.flops() == {"forward": 2 * per_product, "backward": 5 * per_product, "both": 7 * per_product}


def test_positions_restart_with_each_document() -> None:
    assert packed_rows.positions(np.array([[1, 1, 2, 3, 3, 3], [1, 1, 1, 1, 2, 2]])).tolist() == [
        [0, 1, 0, 0, 1, 2],
        [0, 1, 2, 3, 0, 1],
    ]


def test_an_error_that_is_no_number_is_infinite() -> None:
    want = np.array([1.0, -4.0])
    assert packed_rows.relative_error(np.array([1.0, -3.0]), want) == 0.25
    assert packed_rows.relative_error(np.array([1.0, np.nan]), want) == np.inf
    assert packed_rows.relative_error(np.array([1.0]), want) == np.inf


def test_seconds_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.002

    monkeypatch.setattr(packed_rows.time, "perf_counter", lambda: now[0])
    assert packed_rows.seconds_per_call(call, lambda result: None) == pytest.approx(0.002)
