"""Each number of devices has its rows, and what it is held against is what the docstring says."""

from __future__ import annotations

from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import TrainConfig
from tests.helpers import tiny_config
from tests.tools.conftest import Recorded
from tools.bench import scaling as bench_scaling

CONFIG = tiny_config(train=TrainConfig(steps=10, batch_size=6, sequence_length=32, microbatch_size=2))


@pytest.mark.parametrize(("kind", "alone_rows"), [("cpu", 8), ("NVIDIA H200", 2)])
def test_what_devices_are_held_against(kind: str, alone_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[dict[str, Any], str]] = []

    def run(job: dict[str, Any], python: str, environment: dict[str, str]) -> dict[str, Any]:
        jobs.append((job["config"], environment["XLA_FLAGS"].partition("=")[2]))
        count = int(jobs[-1][1])
        seconds = {4: 3.0, 1: 1.5}[count]
        return {"devices": count, "device": kind, "accelerator": kind != "cpu", "step_seconds": [9.0, seconds, 0.1]}

    monkeypatch.setattr(bench_scaling, "run_contender", run)
    found = bench_scaling.measure(CONFIG, "fsdp", 4, 2, 3)
    (split, alone), counts = zip(*jobs, strict=True)
    assert counts == ("4", "1")
    assert split["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert [(each["train"]["batch_size"], each["train"]["microbatch_size"]) for each in (split, alone)] == [
        (8, 0),
        (alone_rows, 0),
    ]
    assert (found["rows"], found["efficiency"], found["tokens_per_second"]) == (8, 0.5, 8 * 32 / 3.0)
    assert f"{'the same' if kind == 'cpu' else 'its own'} rows" in bench_scaling.table([found], CONFIG, "fsdp")


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="1 or more"):
        bench_scaling.main(["--config=configs/nano.py", "--devices", "0"])


def test_each_number_of_devices_is_recorded(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: dict[str, Any], python: str, environment: dict[str, str]) -> dict[str, Any]:
        devices = int(environment["XLA_FLAGS"].partition("=")[2])
        return {"devices": devices, "device": "cpu", "accelerator": False, "step_seconds": [float(1 + devices)]}

    monkeypatch.setattr(bench_scaling, "run_contender", run)
    bench_scaling.main(["--config=configs/nano.py", "--devices", "1", "3", "--record"])
    assert recorded("scaling") == {
        "nano, mesh.data, 1 device": (192, "tokens/s", None, None),
        "nano, mesh.data, 1 device: efficiency": (1.0, None, None, None),
        "nano, mesh.data, 3 devices": (288, "tokens/s", None, None),
        "nano, mesh.data, 3 devices: efficiency": (0.5, None, None, None),
    }
