"""Files for recorded figures that are not the project's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.bench import benchmarks

Recorded = Callable[[str], dict[str, tuple[Any, ...]]]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Lets --record write into files of its own. Called with a subject: value, unit, limit and holds of each figure."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for path in benchmarks.FOLDER.glob("*.jsonl"):
        (folder / path.name).touch()
    monkeypatch.setattr(benchmarks, "FOLDER", folder)

    def read(subject: str) -> dict[str, tuple[Any, ...]]:
        lines = benchmarks.read(folder / f"{subject}.jsonl")
        return {line["figure"]: tuple(line[name] for name in ("value", "unit", "limit", "holds")) for line in lines}

    return read
