"""What a save costs is measured on real saves, and too much of it is exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from tests.tools.conftest import Recorded
from tools.bench import checkpoint as bench_checkpoint

SMALL = (
    *("--config.model.vocab_size=256", "--config.model.width=64", "--config.model.mlp_width=96"),
    *("--config.model.layers=1", "--config.train.sequence_length=32", "--config.train.batch_size=8"),
    *("--config.train.microbatch_size=0", "--config.eval.batch_size=8"),
)
CONFIG = f"--config={Path(__file__).resolve().parents[3] / 'configs' / 'nano.py'}"

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_save_is_measured_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [CONFIG, *SMALL, "--saves=1", f"--folder={tmp_path}", "--json", "--check"]
    monkeypatch.setattr(bench_checkpoint, "SECONDS_PER_GB", 1e9)  # so small a state is all fixed cost
    bench_checkpoint.main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["held up, s"] <= found["until the step is saved, s"]
    assert 0 < found["held up, share of training"] < 1
    assert found["held up, s/GB"] == pytest.approx(found["held up, s"] / found["state, GB"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(bench_checkpoint, "SECONDS_PER_GB", 0.0)
    with pytest.raises(CheckFailed, match="holds training up"):
        bench_checkpoint.main(arguments)


def test_no_save_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--saves=0: expected 1 or more"):
        bench_checkpoint.main([CONFIG, "--saves=0"])


def test_what_a_save_costs_is_recorded_with_its_limits(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "state, GB": 1.21,
        "step, s": 0.5,
        "held up, s": 0.4,
        "held up, s/GB": 0.33,
        "held up, share of training": 0.00013,
        "until the step is saved, s": 5.3,
        "checksums, s/GB, on another thread": 0.5,
        "verified load, s": 4.0,
    }
    monkeypatch.setattr(bench_checkpoint, "measure", lambda config, folder, saves: found)
    with pytest.raises(CheckFailed):  # and recorded all the same
        bench_checkpoint.main([CONFIG, "--record", "--check"])
    figures = recorded("checkpoints")
    assert figures["nano: held up by a save, per GB"] == (0.33, "s/GB", "below 0.3", False)
    assert figures["nano: held up, share of training"] == (0.013, "%", "below 2%", True)
    assert figures["nano: verified load"] == (4.0, "s", None, None)
    assert len(figures) == 6
