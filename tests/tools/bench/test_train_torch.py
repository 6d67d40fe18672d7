"""A PyTorch trainer beside ours: both learn from the same rows for the same time, and are judged by one measure."""

from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, DataConfig, EvalConfig, TokenizerConfig, TrainConfig
from tests.helpers import tiny_config, tiny_model
from tests.tools.conftest import Recorded
from tools.bench import train_torch

pytestmark = pytest.mark.usefixtures("standard_promotion")


def config_in(root: Path) -> Config:
    (root / "code").mkdir()
    for number in range(40):
        body = "\n".join(f"    total_{index} = {index} + {number}" for index in range(8))
        (root / "code" / f"file_{number}.py").write_text(f"def function_{number}():\n{body}\n    return total_7\n")
    return tiny_config(
        model=tiny_model(vocab_size=256, context=64),
        data=DataConfig(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2, workers=0),
        tokenizer=TokenizerConfig(kind="bytes"),
        train=TrainConfig(steps=20, batch_size=8, sequence_length=64, log_every=10),
        eval=EvalConfig(every=20, batches=2, batch_size=8, sample_tokens=0),
    )


@pytest.mark.slow
def test_theirs_gets_our_time_and_our_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = config_in(tmp_path)
    rows = train_torch.compare(config, tmp_path / "runs", 3e-3)
    assert rows is not None
    assert [row.name for row in rows] == ["smallcoder_jax", "torch", "torch autocast"]
    assert rows[0].steps == 20
    for row in rows[1:]:
        assert rows[0].seconds <= row.seconds < 2 * rows[0].seconds
        assert row.tokens == row.steps * 8 * 64
        assert 0 < row.bits_per_byte < 6  # 8 untrained
    shown = train_torch.table(rows)
    assert "torch autocast" in shown
    assert f"{rows[1].bits_per_byte:.3f}" in shown


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    flags = ["--config=configs/nano.py", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=r"exists: the time of a continued run cannot be compared"):
        train_torch.main(flags)
    with pytest.raises(UserError, match=r"compares with Llama"):
        train_torch.main([*flags, "--config.model.norm=layernorm"])
    with pytest.raises(UserError, match=r"--learning-rate=nan: expected"):
        train_torch.main([*flags, "--learning-rate=nan"])
    with pytest.raises(UserError, match=r"compute.dtype=bfloat16: expected float32"):
        train_torch.main([*flags, "--config.compute.dtype=bfloat16"])
    with pytest.raises(UserError, match=r"give a config without a stage"):
        train_torch.main([*flags, "--config.stage.start=runs/other"])
    with pytest.raises(UserError, match=r"train.microbatch_size=1: theirs has none"):
        train_torch.main([*flags, "--config.train.microbatch_size=1"])


def test_all_trainers_are_recorded(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [train_torch.Row("smallcoder_jax", 20, 10_240, 4.4, 1.398), train_torch.Row("torch", 18, 9_216, 4.4, 1.981)]
    monkeypatch.setattr(train_torch, "check", lambda config, learning_rate: None)  # which imports torch
    monkeypatch.setattr(train_torch, "compare", lambda config, workdir, learning_rate: rows)
    assert train_torch.main(["--config=configs/nano.py", f"--workdir={tmp_path / 'runs'}", "--record"]) == 0
    figures = recorded("quickstart")
    assert figures["smallcoder_jax, equal time: bits per byte"] == (1.398, None, None, None)
    assert figures["torch, equal time: steps"] == (18, None, None, None)
    assert figures["torch, equal time: seconds"] == (4, "s", None, None)
