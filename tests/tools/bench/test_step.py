import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.config import Config, TrainConfig
from smallcoder_jax.configfile import load_config
from tests.helpers import tiny_config
from tests.tools.conftest import Recorded
from tools.bench import op_profile, step_timing, step_torch
from tools.bench import step as bench_step

NANO, BYTE_NANO = (
    str(Path(bench_step.__file__).resolve().parents[2] / "configs" / name) for name in ("nano.py", "byte_nano.py")
)


def result(step_seconds: list[float], memory: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "software": "software",
        "device": "cpu",
        "devices": 1,
        "accelerator": False,
        "products": "exact",
        "profile": [],
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
    first, again = step_timing.random_batches(config, 8), step_timing.random_batches(config, 8)
    for batch, same in zip(first, again, strict=True):
        assert all(np.array_equal(batch[key], same[key]) for key in batch)
        assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        new = np.diff(batch["segment_ids"], axis=1) == 1
        assert (batch["positions"][:, 0] == 0).all()
        assert (batch["positions"][:, 1:] == np.where(new, 0, batch["positions"][:, :-1] + 1)).all()
    assert [int(batch["segment_ids"].max()) for batch in first] == [4] * len(first)  # rows of 32
    for batch in step_timing.random_batches(config, None):
        assert (batch["segment_ids"] == 1).all()


def test_flops_are_those_that_documents_leave(config: Config) -> None:
    batches = step_timing.random_batches(config, 8)
    same = [batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None, :] for batch in batches]
    pairs = sum(int((one & np.tril(np.ones((32, 32), bool))).sum()) for one in same)
    assert step_timing.visible_share(config, 8) == pytest.approx(pairs / (len(batches) * 16 * 32 * 33 / 2))
    assert step_timing.visible_share(config, None) == 1


@pytest.mark.parametrize(("text", "mean"), [(None, 8), ("row", None), ("5", 5)])
def test_documents_are_asked_for_by_their_mean_length(config: Config, text: str | None, mean: int | None) -> None:
    assert bench_step.documents_of(text, config) == mean


@pytest.mark.parametrize("text", ["0", "32", "two"])
def test_documents_that_do_not_fit_are_refused(config: Config, text: str) -> None:
    with pytest.raises(UserError, match=r"a mean length below train\.sequence_length=32"):
        bench_step.documents_of(text, config)


@pytest.mark.usefixtures("standard_promotion")
def test_ours_takes_steps_and_says_what_they_cost(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "PEAK_SIZE", 64)
    found = bench_step.measure_ours(config, 3, None, profile=False)
    assert len(found["step_seconds"]) == 3
    assert found["peak_measured"]
    assert found["memory"] > found["compiled_memory"] > 0
    assert found["loss"] == pytest.approx(np.log(config.model.vocab_size), rel=0.1)


@pytest.mark.parametrize(("attention", "autocast"), [("causal", False), ("sdpa", False), ("causal", True)])
def test_torch_runs_the_same_shape(config: Config, attention: str, autocast: bool) -> None:
    found = step_torch.measure_torch("torch", config, 2, 8, attention=attention, compile=False, autocast=autocast)
    assert found["software"].endswith("autocast") == autocast
    assert len(found["step_seconds"]) == 2
    assert found["loss"] == pytest.approx(np.log(config.model.vocab_size), rel=0.1)
    assert "torch" in found["software"]


def test_torch_keeps_documents_apart_only_where_it_is_asked_to(config: Config) -> None:
    import torch

    def loss(attention: str, documents: int | None) -> float:
        _, model, loss_of = step_torch.BUILDERS["torch"](config, attention)
        model.apply(
            lambda module: torch.nn.init.normal_(module.weight) if isinstance(module, torch.nn.Linear) else None
        )
        batch = step_timing.random_batches(config, documents)[0]
        part = {name: torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "positions")}
        part["tokens"][:] = torch.arange(32)  # the same, whatever the documents
        return float(loss_of(model, part).detach())

    whole = loss("causal", None)
    assert loss("causal", 8) == whole
    assert loss("sdpa", None) == pytest.approx(whole, rel=1e-5)
    assert abs(loss("sdpa", 8) - whole) > 1e-3


def test_a_trainer_that_is_not_installed_is_named_with_its_command(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litgpt", None)
    with pytest.raises(UserError, match="pip install 'litgpt'"):
        step_torch.measure_torch("litgpt", config, 1, None, attention="causal", compile=False, autocast=False)


def test_median_over_rounds_and_ratios(config: Config) -> None:
    rounds = {
        "ours": [result([1.0, 1.0], 100), result([1.0, 9.0], 90, peak_flops=2e12)],
        "torch": [result([2.0, 2.0], 200), result([2.0, 2.0], 210)],
    }
    report = bench_step.summarise(rounds, config)
    tokens = 16 * 32
    assert report["contenders"]["ours"]["tokens_per_second"] == tokens
    assert report["contenders"]["ours"]["mfu"] == pytest.approx(tokens * 1e6 / 2e12)
    assert report["ratios"] == {"torch": {"speed": 2.0, "memory": pytest.approx(100 / 210), "wanted": 1.2}}
    report |= {"optimizer": "adamw", "documents": None, "profile": []}
    text = bench_step.table(report)
    assert "2.00" in text
    assert "0.48" in text
    assert "measured: one large matrix product" in text
    bench_step.check(report)


def checked(**changes: Any) -> None:
    report = {"name": "x", "documents": None, "device": "cpu", "memory_of": "process", "ratios": {}}
    bench_step.check(report | changes)


@pytest.mark.parametrize(
    ("path", "ours", "name", "wanted"),
    [
        (NANO, {}, "torch", 1.2),
        (NANO, {"products": "mixed"}, "torch", 1.6),
        (NANO, {"products": "mixed"}, "torch autocast", 1.25),
        (NANO, {"accelerator": True}, "torch", 1.3),
        (BYTE_NANO, {"products": "mixed"}, "torch", 2.0),
    ],
)
def test_check_fails_on_either(path: str, ours: dict[str, Any], name: str, wanted: float) -> None:
    assert bench_step.wanted_ratio(name, result([1.0], 1, **ours), load_config(path, [])) == wanted

    def ratio(speed: float, memory: float) -> None:
        checked(ratios={name: {"speed": speed, "memory": memory, "wanted": wanted}})

    ratio(wanted, 1.0)
    with pytest.raises(CheckFailed, match=rf"{wanted - 0.01:.2f} times the tokens per second of {name}"):
        ratio(wanted - 0.01, 0.5)
    with pytest.raises(CheckFailed, match=f"1.01 times the memory of {name}"):
        ratio(wanted + 1.0, 1.01)


def test_check_fails_below_what_is_promised_of_an_h200() -> None:
    def medium_lc(tokens: float, documents: int | None, device: str = "NVIDIA H200") -> None:
        ours = {"ours": {"tokens_per_second": tokens}}
        checked(name="smallcoder-medium-lc", documents=documents, device=device, contenders=ours)

    medium_lc(160_000, None)
    medium_lc(230_000, 2048)
    with pytest.raises(CheckFailed, match="159,999 tokens per second; expected 160,000"):
        medium_lc(159_999, None)
    with pytest.raises(CheckFailed, match="160,000 tokens per second; expected 230,000"):
        medium_lc(160_000, 2048)
    with pytest.raises(CheckFailed, match="not of NVIDIA A100"):
        medium_lc(500_000, None, "NVIDIA A100")


def test_unlike_hardware_is_not_compared(config: Config) -> None:
    rounds = {
        "ours": [result([1.0], 1, accelerator=True, device="NVIDIA H200", devices=1)],
        "torch": [result([1.0], 1)],
    }
    with pytest.raises(UserError, match="ours ran on 1 x NVIDIA H200, torch on 1 x cpu"):
        bench_step.summarise(rounds, config)


def test_contenders_take_turns_with_adamw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def run(job: dict[str, Any], python: str) -> dict[str, Any]:
        calls.append((job["name"], job["autocast"], job["config"]["optimizer"]["name"], job["documents"], python))
        return result([1.0] if job["name"] == "ours" else [1.1], 10)

    monkeypatch.setattr(bench_step, "run_contender", run)
    with pytest.raises(CheckFailed, match=r"1\.10 times"):
        bench_step.main([f"--config={NANO}", "--against=torch", "--steps=5", "--check", "--torch-python=other"])
    turns = [("ours", sys.executable), ("torch", "other"), ("torch", "other"), ("ours", sys.executable)]
    assert calls == [(name, False, "adamw", 96, python) for name, python in turns]
    assert "adamw (the config says muon)" in capsys.readouterr().out


def test_autocast_is_a_contender_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run(job: dict[str, Any], python: str) -> dict[str, Any]:
        calls.append((job["name"], job["autocast"]))
        seconds = {("ours", False): 1.0, ("torch", False): 3.0, ("torch", True): 2.0}[calls[-1]]
        return result([seconds], 10, products="mixed")

    monkeypatch.setattr(bench_step, "run_contender", run)
    bench_step.main([f"--config={NANO}", "--against=torch", "--autocast", "--rounds=1", "--check"])
    assert calls == [("ours", False), ("torch", False), ("torch", True)]
    shown = capsys.readouterr().out
    assert "ours / torch autocast" in shown
    assert "float32, mixed products" in shown
    for flags in (["--autocast"], ["--against=torch", "--autocast", "--config.compute.dtype=bfloat16"]):
        with pytest.raises(UserError, match="--autocast is of --against"):
            bench_step.main([f"--config={NANO}", *flags])


@pytest.mark.usefixtures("standard_promotion")
def test_the_shares_of_a_profile_add_up_to_the_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "PEAK_SIZE", 64)
    found = bench_step.measure_ours(config, 3, None, profile=True)
    rows = [op_profile.Row(**row) for row in found["profile"]]
    assert len(rows) > 10
    assert rows[-1].name == "(idle)"
    assert all(row.seconds >= 0 for row in rows)
    model, tokens = config.model, config.train.batch_size * config.train.sequence_length
    dense = 6.0 * tokens * (model.parameter_count() - model.width * (2 * model.layers + 1))
    attention = sum(row.flops for row in rows) - dense
    assert 0 < attention < 0.2 * dense  # every product was found, in fusions and loops, as often as it ran
    shown = op_profile.table(rows)
    assert shown.splitlines()[-1].split()[:3] == ["one", "step", "100%"]


def test_bad_input_is_refused_before_anything_runs(config: Config) -> None:
    with pytest.raises(UserError, match="add --against=torch"):
        bench_step.main([f"--config={NANO}", "--check"])
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="layernorm"))
    with pytest.raises(UserError, match=r"model\.norm='layernorm' instead of 'rmsnorm'"):
        step_torch.check_shape(other, "torch", "causal")
    bytes_config = [f"--config={BYTE_NANO}", "--against=litgpt"]
    with pytest.raises(UserError, match="'hnet': this contender has only decoders"):
        bench_step.main(bytes_config)
    with pytest.raises(UserError, match="--their-attention=sdpa: for a byte-level model"):
        bench_step.main([f"--config={BYTE_NANO}", "--against=torch", "--their-attention=sdpa"])


def test_a_contender_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="process of ours ended with 1"):
        bench_step.run_contender({"name": "ours"}, "false")


def test_figures_are_recorded_with_the_limits_of_check(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: dict[str, Any], python: str) -> dict[str, Any]:
        seconds = 1.0 if job["name"] == "ours" else 1.3 if job["autocast"] else 1.5
        return result([seconds], (3 if job["autocast"] else 4) << 20, products="mixed")

    monkeypatch.setattr(bench_step, "run_contender", run)
    with pytest.raises(CheckFailed):  # and recorded all the same
        bench_step.main([f"--config={NANO}", "--against=torch", "--autocast", "--rounds=1", "--check", "--record"])
    figures = recorded("cpu-step")
    assert figures["nano 3x384/96 mixed: tokens/s"] == (1152, None, None, None)
    assert figures["nano 3x384/96 mixed: torch memory"] == (4, "MiB", None, None)
    assert figures["nano 3x384/96 mixed: times torch"] == (1.5, None, "≥ 1.6", False)
    assert figures["nano 3x384/96 mixed: times torch autocast"] == (1.3, None, "≥ 1.25", True)
    assert figures["nano 3x384/96 mixed: memory / torch autocast"] == (1.3333, None, "≤ 1", False)
    assert figures["nano 3x384/96 mixed: MFU"] == (0.1152, "%", None, None)
    assert recorded("gpu-step") == {}


def test_what_is_promised_of_an_h200_is_recorded(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = {"accelerator": True, "device": "NVIDIA H200"}
    monkeypatch.setattr(bench_step, "run_contender", lambda job, python: result([0.5], 1 << 30, **h200))
    config = f"--config={Path(NANO).parent / 'medium_lc.py'}"
    bench_step.main([config, "--config.train.batch_size=8", "--documents=row", "--record"])
    figures = recorded("gpu-step")
    assert figures["medium-lc 8x8192/row bf16: tokens/s"] == (131072, None, "≥ 160,000", False)
    assert figures["medium-lc 8x8192/row bf16: memory"] == (1024, "MiB", None, None)
