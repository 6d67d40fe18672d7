"""The report: what fits, what would, what it says; and the command around it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from smallcoder_jax.base.errors import EXIT_CHECK_FAILED, EXIT_USER_ERROR, UserError, run_cli
from smallcoder_jax.config import Config, EvalConfig, MeshConfig, TrainConfig
from smallcoder_jax.main import main
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.ops import cross_entropy
from smallcoder_jax.preflight import estimate
from smallcoder_jax.preflight.collectives import Collective, Traffic
from smallcoder_jax.preflight.examine import Report, divided, examine, refused_bytes
from smallcoder_jax.preflight.show import table
from smallcoder_jax.preflight.target import CHIPS, Target
from smallcoder_jax.stages.shared.next_token import make_loss
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
from smallcoder_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "small"
    config.model.update(
        vocab_size=96, width=64, mlp_width=96, layers=1, heads=2, kv_heads=1, head_size=16, context=64
    )
    config.compute.dtype = "float32"
    config.train.update(steps=5, batch_size=12, microbatch_size=6, sequence_length=32)
    config.eval.sample_tokens = 0
    return config
"""


def report_of(config: Config, memory: float, devices: int = 1) -> Report:
    target = Target("here", jax.devices()[:devices], memory, "said")
    return examine(config, make_loss(config), target, tokens=1e6, price=2.0)


def of_rows(batch: int, microbatch: int = 0) -> Config:
    return tiny_config(train=TrainConfig(steps=10, batch_size=batch, microbatch_size=microbatch, sequence_length=32))


@pytest.fixture(scope="module")
def ample() -> Report:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return report_of(of_rows(8, 4), 2.0**28)


def test_memory_is_counted_by_device(ample: Report) -> None:
    config = of_rows(8, 4)
    memory = ample.memory
    parameters = 4 * config.model.parameter_count()
    assert memory.parameters == memory.gradients == parameters
    assert 2 * parameters <= memory.optimizer < 2 * parameters + 100
    assert memory.activations is not None
    assert memory.peak is not None
    assert memory.peak > 4 * parameters
    assert memory.fits
    assert ample.remedy is None
    split = report_of(dataclasses.replace(of_rows(8), mesh=MeshConfig(data=1, fsdp=8)), 2.0**28, devices=8)
    assert split.memory.parameters < parameters / 6
    assert split.memory.peak is not None
    assert split.memory.peak < memory.peak


def test_the_largest_microbatch_fits_and_is_near_the_limit(ample: Report) -> None:
    largest = ample.largest
    assert largest.estimate is None
    assert largest.rows > 4
    at_the_largest = report_of(of_rows(2 * largest.rows, largest.rows), 2.0**28)
    assert at_the_largest.memory.fits
    assert at_the_largest.memory.peak is not None
    assert at_the_largest.memory.peak > 0.9 * 2.0**28


@pytest.mark.slow
def test_what_does_not_fit_gets_the_nearest_microbatch_that_does() -> None:
    whole = report_of(of_rows(64), 2.0**40)
    assert whole.memory.peak is not None
    memory = whole.memory.peak * 0.6
    report = report_of(of_rows(64), memory)
    assert not report.memory.fits
    assert report.remedy is not None
    (flag,) = report.remedy
    rows = int(flag.removeprefix("--config.train.microbatch_size="))
    assert 64 % rows == 0
    assert rows <= report.largest.rows
    assert report_of(of_rows(64, rows), memory).memory.fits


@pytest.mark.slow
def test_where_no_row_fits_parameters_are_split() -> None:
    config = of_rows(8)
    alone = report_of(config, 2.0**40, devices=8)
    split = report_of(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8)), 2.0**40, devices=8)
    assert alone.memory.peak is not None
    assert split.memory.peak is not None
    memory = (alone.memory.peak + split.memory.peak) / 2
    report = report_of(config, memory, devices=8)
    assert report.largest.rows == 0
    assert report.remedy is not None
    assert report.remedy[-2:] == ("--config.mesh.data=1", "--config.mesh.fsdp=8")
    assert report_of(config, 1.0, devices=8).remedy is None


def test_batches_are_rounded_up_to_what_divides() -> None:
    config = dataclasses.replace(of_rows(32, 8), eval=EvalConfig(batch_size=12))
    rounded, changes = divided(config, 16)
    assert (rounded.train.batch_size, rounded.train.microbatch_size, rounded.eval.batch_size) == (32, 16, 16)
    assert changes == ("--config.train.microbatch_size=16", "--config.eval.batch_size=16")
    rounded, changes = divided(config, 24)
    assert (rounded.train.batch_size, rounded.train.microbatch_size) == (48, 24)
    assert "--config.train.batch_size=48" in changes
    assert divided(of_rows(32, 8), 8) == (of_rows(32, 8), ())
    with pytest.raises(UserError, match="does not multiply to the 16 devices"):
        divided(dataclasses.replace(config, mesh=MeshConfig(data=3)), 16)


def test_roofline_is_the_slowest_of_three() -> None:
    config, chip = of_rows(8), CHIPS["NVIDIA H200"]
    tokens, flops = 8 * 32, DECODER.flops_per_token(config.model, 32)
    sent = Traffic((Collective("all-reduce", 1, 0.0, 4.5e11, 1e11),), 0)
    slow_links = estimate.roofline(config, flops, 4.8e12, sent, chip, 1e9, devices=2)
    assert slow_links.memory == pytest.approx(1.0)
    assert slow_links.collectives == pytest.approx(2.0)  # between hosts
    assert slow_links.step == 2.0
    assert slow_links.arithmetic == pytest.approx(flops * tokens / 2e9)
    assert slow_links.mfu == pytest.approx(slow_links.arithmetic / 2.0)
    cost = estimate.budget(config, step=2.0, tokens=tokens * 1800, devices=4, price=3.0)
    assert (cost.hours, cost.chip_hours, cost.cost) == pytest.approx((1.0, 4.0, 12.0))
    assert estimate.budget(config, 2.0, 1e6, 4, None).cost is None


def test_what_is_computed_again_is_arithmetic_too() -> None:
    config = of_rows(8)
    whole, chunked = cross_entropy.Choice(None, ""), cross_entropy.Choice(8, "")
    flops = DECODER.flops_per_token(config.model, 32)
    unembedding = 2 * config.model.vocab_size * config.model.width
    assert estimate.executed_per_token(config, whole) == flops
    assert estimate.executed_per_token(config, chunked) == flops + unembedding
    full = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="full"))
    assert estimate.executed_per_token(full, whole) == pytest.approx(flops * 4 / 3 - unembedding)


def test_messages_of_a_compiler_that_refuses() -> None:
    one = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    other = "the total memory required for HLO temporaries (512.00G) exceeds available HBM (15.75G)."
    assert refused_bytes(one) == 20.5 * 2**30
    assert refused_bytes(other) == 512 * 2**30
    assert refused_bytes("RESOURCE_EXHAUSTED: something else") is None


def test_the_table_and_the_json_say_the_same(ample: Report) -> None:
    said = table(ample)
    plain = json.loads(json.dumps(dataclasses.asdict(ample)))
    assert plain["memory"]["peak"] == ample.memory.peak
    assert plain["budget"] is None
    assert f"{plain['largest']['rows']} rows per device" in said
    for words in ("parameters", "optimizer", "activations", "peak", "available", "fits", "FLOPs per token", "said"):
        assert words in said, words
    assert "no figures of cpu" in said
    assert all(math.isfinite(value) for value in plain["memory"].values() if isinstance(value, float))


def command(tmp_path: Path, *more: str) -> list[str]:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return [f"--config={path}", "--mode=preflight", *more]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--topology=cpu", f"--json={tmp_path / 'report.json'}")) == 0
    said = capsys.readouterr().out
    assert said.startswith("small on cpu: 8 x cpu\n")
    assert "rows divide over the mesh; train with --config.train.batch_size=16 --config.train.microbatch_size=8" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["batch_size"] == 16
    assert report["traffic"]["collectives"][0]["kind"] == "all-reduce"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "small.py"]


def test_mistakes_are_code_2_and_what_does_not_fit_is_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*more: str, mode: str = "--mode=preflight") -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: main([*command(tmp_path), mode, *more]))
        return ended.value.code, capsys.readouterr().err

    cases = {
        "--mode=preflight needs --topology": [],
        "did you mean 'v5e:16x16'": ["--topology=v5e:16x17"],
        "--price=-1: expected a positive number": ["--topology=cpu", "--price=-1"],
        "--tokens=inf: expected a positive number": ["--topology=cpu", "--tokens=inf"],
        "--step belongs to --mode=evaluate": ["--topology=cpu", "--step=3"],
    }
    for expected, flags in cases.items():
        code, said = end(*flags)
        assert code == EXIT_USER_ERROR
        assert expected in said
    code, said = end("--topology=cpu", mode="--mode=train")
    assert code == EXIT_USER_ERROR
    assert "--topology belongs to --mode=preflight" in said
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10)  # a machine of one MiB
    code, said = end("--topology=cpu")
    assert code == EXIT_CHECK_FAILED
    assert said.startswith("check failed: small does not fit into the memory of cpu")


@pytest.mark.slow
def test_the_peak_agrees_with_what_nano_takes_on_a_cpu() -> None:
    """Within 10%: see tests/preflight/measured.py for what is measured."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.preflight.measured", "configs/nano.py"],
        cwd=ROOT,
        # Every array is taken from Linux by itself and given back: no other array's leftovers serve for it.
        env={**environment, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout)
    assert memory["measured"] == pytest.approx(memory["reported"], rel=0.1)
