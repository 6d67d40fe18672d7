"""Steps that a kill loses are counted from what the next start says, and a real run is killed and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from tests.faults.runs import Runs
from tests.tools.conftest import Recorded
from tools.bench import restarts as bench_restarts


def test_steps_since_the_newest_save_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    every, trained, lives = 7, 0, []

    def life(given: list[str], step: int, cache: Path) -> tuple[float, int]:
        nonlocal trained
        resumed = trained // every * every
        lives.append((resumed, trained))
        trained = step - 1
        assert resumed <= lives[-1][1] <= trained
        return float(len(lives)), resumed

    monkeypatch.setattr(bench_restarts, "life", life)
    found = bench_restarts.measure([], every, 20, Path())
    lost = [trained - resumed for resumed, trained in lives[2:]]
    assert len(lost) == 20
    assert found["steps lost, most"] == max(lost) < every
    assert found["steps lost, mean"] == pytest.approx(sum(lost) / 20)
    assert (found["first start, s"], found["second start, s"], found["start after a kill, s"]) == (1.0, 2.0, 12.5)


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    given = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every=2"]
    seconds, resumed = bench_restarts.life(given, 6, tmp_path / "xla")
    assert (seconds > 0, resumed) == (True, 0)
    assert bench_restarts.life(given, 8, tmp_path / "xla")[1] in (2, 4)
    assert runs.steps("run")
    with pytest.raises(UserError, match="ended with 0 before step 99"):
        bench_restarts.life(given, 99, tmp_path / "xla")


def test_what_a_kill_costs_is_recorded_with_its_limit(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "checkpoint.every": 10,
        "first start, s": 12.9,
        "second start, s": 3.6,
        "start after a kill, s": 3.4,
        "steps lost, mean": 7.33333333,
        "steps lost, most": 10,
    }
    monkeypatch.setattr(bench_restarts, "measure", lambda given, every, kills, cache: found)
    bench_restarts.main(["--config=configs/nano.py", "--record"])
    figures = recorded("restarts")
    assert figures["nano: steps lost by a kill, most"] == (10, None, "below 20", True)
    assert figures["nano: steps lost by a kill, mean"] == (7.3333, None, None, None)
    assert figures["nano: first start"] == (12.9, "s", None, None)
