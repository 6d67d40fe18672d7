"""What the benchmark of the input pipeline records; nothing is measured here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from smallcoder_jax.base.errors import CheckFailed
from tests.tools.conftest import Recorded
from tools.bench import data as bench_data


def test_each_pipeline_is_recorded_ours_with_the_limit(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(pipeline: str, workers: int, speed: int) -> dict[str, Any]:
        return {"pipeline": pipeline, "workers": workers, "resumes_exactly": True, "tokens_per_second": speed}

    source = SimpleNamespace(train=SimpleNamespace(documents=2, tokens=10))
    prepared = SimpleNamespace(manifest=SimpleNamespace(sources=[source]))
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(bench_data, "_prepare", lambda *_: prepared)
    monkeypatch.setattr(bench_data, "_measure_ours", lambda _, workers, __: row("grain", workers, 2_999_999 + workers))
    monkeypatch.setattr(bench_data, "_measure_torch", lambda *_: [row("datasets + DataLoader", 0, 40_500_000)])
    with pytest.raises(CheckFailed, match="2,999,999 tokens/s"):  # and recorded all the same
        bench_data.main(["--record", "--check"])
    assert recorded("data") == {
        "ours, 0 workers: tokens/s": (2_999_999, None, "≥ 3M", False),
        "ours, 2 workers: tokens/s": (3_000_001, None, "≥ 3M", True),
        "datasets + DataLoader, 0 workers: tokens/s": (40_500_000, None, None, None),
    }
