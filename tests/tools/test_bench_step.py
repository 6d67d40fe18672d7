import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcoder_jax.config import Config, TrainConfig
from smallcoder_jax.errors import CheckFailed, UserError
from tests.helpers import tiny_config
from tools import bench_step

NANO = str(Path(bench_step.__file__).resolve().parents[1] / "configs" / "nano.py")


def result(step_seconds: list[float], memory: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "software": "software",
        "device": "cpu",
        "devices": 1,
        "accelerator": False,
        "step_seconds": step_seconds,
        "compile_seconds": 1.0,
        "loss": 4.6,
        "memory": memory,
        "compiled_memory": 1 << 20,
        "flops_per_token": 1e6,
        "peak_flops": 1e12,
        "peak_measured": True,
    }
    return fields | changes


@pytest.fixture
def config() -> Config:
    return tiny_config(train=TrainConfig(steps=10, batch_size=16, sequence_length=32, microbatch_size=8))


def test_batches_are_packed_rows_whose_positions_restart_with_each_document(config: Config) -> None:
    first, again = bench_step.random_batches(config), bench_step.random_batches(config)
    for batch, same in zip(first, again, strict=True):
        assert all(np.array_equal(batch[key], same[key]) for key in batch)
        assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        new = np.diff(batch["segment_ids"], axis=1) == 1
        assert (batch["positions"][:, 0] == 0).all()
        assert (batch["positions"][:, 1:] == np.where(new, 0, batch["positions"][:, :-1] + 1)).all()
    assert max(batch["segment_ids"].max() for batch in first) > 1


@pytest.mark.usefixtures("standard_promotion")
def test_ours_takes_steps_and_says_what_they_cost(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "PEAK_SIZE", 64)
    found = bench_step.measure_ours(config, 3)
    assert len(found["step_seconds"]) == 3
    assert found["peak_measured"]
    assert found["memory"] > found["compiled_memory"] > 0
    assert found["loss"] == pytest.approx(np.log(config.model.vocab_size), rel=0.1)


def test_torch_runs_the_same_shape(config: Config) -> None:
    found = bench_step.measure_torch(config, 2, compile_torch=False)
    assert len(found["step_seconds"]) == 2
    assert found["loss"] == pytest.approx(np.log(config.model.vocab_size), rel=0.1)
    assert "torch" in found["software"]


def test_median_over_rounds_and_ratios(config: Config) -> None:
    rounds = {
        "ours": [result([1.0, 1.0], 100), result([1.0, 9.0], 90, peak_flops=2e12)],
        "torch": [result([2.0, 2.0], 200), result([2.0, 2.0], 210)],
    }
    report = bench_step.summarise(rounds, config)
    tokens = 16 * 32
    assert report["contenders"]["ours"]["tokens_per_second"] == tokens
    assert report["contenders"]["ours"]["mfu"] == pytest.approx(tokens * 1e6 / 2e12)
    assert report["speed_ratio"] == 2.0
    assert report["memory_ratio"] == pytest.approx(100 / 210)
    report["optimizer"] = "adamw"
    text = bench_step.table(report)
    assert "2.00" in text
    assert "0.48" in text
    assert "measured: one large matrix product" in text
    bench_step.check(report)


@pytest.mark.parametrize(("ratio", "memory", "words"), [(1.19, 0.5, "1.19 times"), (1.3, 1.01, "1.01 times")])
def test_check_fails_on_either(ratio: float, memory: float, words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        bench_step.check({"speed_ratio": ratio, "memory_ratio": memory})


def test_unlike_hardware_is_not_compared(config: Config) -> None:
    rounds = {
        "ours": [result([1.0], 1, accelerator=True, device="NVIDIA H200", devices=1)],
        "torch": [result([1.0], 1)],
    }
    with pytest.raises(UserError, match="ours ran on 1 x NVIDIA H200, torch on 1 x cpu"):
        bench_step.summarise(rounds, config)


def test_contenders_take_turns_with_adamw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def run(name: str, config: Config, steps: int, compile_torch: bool) -> dict[str, Any]:
        calls.append((name, config.optimizer.name, steps, compile_torch))
        return result([1.0] if name == "ours" else [1.1], 10)

    monkeypatch.setattr(bench_step, "run_contender", run)
    with pytest.raises(CheckFailed, match=r"1\.10 times"):
        bench_step.main([f"--config={NANO}", "--against=torch", "--steps=5", "--check"])
    assert calls == [(name, "adamw", 5, False) for name in ("ours", "torch", "torch", "ours")]
    assert "adamw (the config says muon)" in capsys.readouterr().out


def test_bad_input_is_refused_before_anything_runs(config: Config) -> None:
    with pytest.raises(UserError, match="add --against=torch"):
        bench_step.main([f"--config={NANO}", "--check"])
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="layernorm"))
    with pytest.raises(UserError, match=r"model\.norm='layernorm' instead of 'rmsnorm'"):
        bench_step.check_llama(other)


def test_a_contender_that_fails_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match="process of ours ended with 1"):
        bench_step.run_contender("ours", config, 1, False)
