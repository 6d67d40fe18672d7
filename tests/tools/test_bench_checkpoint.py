"""What a save costs is measured on real saves, and too much of it is exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from tools import bench_checkpoint

SMALL = (
    *("--config.model.vocab_size=256", "--config.model.width=64", "--config.model.mlp_width=96"),
    *("--config.model.layers=1", "--config.train.sequence_length=32", "--config.train.batch_size=8"),
    *("--config.train.microbatch_size=0", "--config.eval.batch_size=8"),
)
CONFIG = f"--config={Path(__file__).resolve().parents[2] / 'configs' / 'nano.py'}"

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
