"""tools/doctor.py: one line for each check, and for a failure what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import CheckFailed
from smallcoder_jax.preflight import target
from tests.faults.test_processes import free_port
from tools import doctor

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROUNDS", 1)
    monkeypatch.setattr(doctor, "WRITE_FLOOR", 0.0)


def test_a_machine_that_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "FREE_GIGABYTES", 0.0)
    monkeypatch.setattr(doctor, "MATMUL_SHARE", 0.0)
    doctor.main([f"--folder={tmp_path / 'new' / 'runs'}", "--hosts=localhost"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 7
    assert "8 x cpu" in lines[2]
    assert "localhost 127.0.0.1" in lines[4] or "localhost ::1" in lines[4]
    assert "the sum is right" in lines[6]
    assert list((tmp_path / "new" / "runs").iterdir()) == []


def test_every_failure_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    monkeypatch.setattr(doctor, "MATMUL_SHARE", 1e6)
    monkeypatch.setitem(target.CHIPS, "cpu", target.Chip(1.0, 1.0, 1e18, 1.0, "a link that no machine has"))
    monkeypatch.setattr(doctor, "JAX_MINIMUM", (99, 1))
    with pytest.raises(CheckFailed, match=r"5 of 7: versions, disk, host names, matmul 0, all-reduce"):
        doctor.main([f"--folder={tmp_path}", "--hosts=no-such-host.invalid"])
    lines = {line[8:22].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")}
    assert "jax 99.1 or newer" in lines["versions"]
    assert "Checkpoints want at least 10 GB" in lines["disk"]
    assert "/etc/hosts of every machine" in lines["host names"]
    assert "look for other programs" in lines["matmul 0"]
    assert "Expected is 25% of" in lines["all-reduce"]


def test_a_check_that_breaks_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def broken(_: str) -> doctor.Finding:
        raise RuntimeError("no backend\nmore of it")

    monkeypatch.setattr(doctor, "check_driver", broken)
    with pytest.raises(CheckFailed, match="driver"):
        doctor.main([f"--folder={tmp_path}"])
    assert "FAILED  driver         RuntimeError: no backend. This check" in capsys.readouterr().out


def test_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr(doctor, "NVIDIA_VERSION", version)
    monkeypatch.delenv("JAX_PLATFORMS")
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}.65.06  Release Build\nGCC version: 12.3\n"
    version.write_text(line.format(580))
    assert doctor.check_driver("gpu") == doctor.Finding("driver", "NVIDIA driver 580.65")
    assert "pip install -e '.[cuda]'" in doctor.check_driver("cpu").remedy
    version.write_text(line.format(550))
    assert "CUDA 13 needs 580" in doctor.check_driver("gpu").remedy


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.check_disk(tmp_path / "file" / "runs")
    assert "Not a directory" in finding.text
    assert "--folder" in finding.remedy


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FREE_GIGABYTES", 0.0)
    monkeypatch.setattr(doctor, "WRITE_FLOOR", 1e9)
    assert "use another disk" in doctor.check_disk(tmp_path).remedy


def test_a_name_that_only_this_machine_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    address = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(doctor.socket, "getaddrinfo", lambda *_, **__: address)
    assert "Remove the line of node1 with 127.0.1.1" in doctor.check_names(["node1"], several=True).remedy
    assert doctor.check_names(["127.0.1.1"], several=True).remedy == ""


def test_wrong_sums_and_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    right = (jnp.matmul, jnp.sum)
    monkeypatch.setattr(jnp, "matmul", lambda a, b: right[0](a, b) * 1.01)
    assert "computes wrongly" in doctor.check_matmul()[0].remedy
    monkeypatch.setattr(jnp, "sum", lambda x, axis: right[1](x, axis=axis) + 1)
    assert "The sum is wrong" in doctor.check_all_reduce().remedy


def test_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    where = f"--coordinator=127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.doctor", where, "--processes=2", f"--process={i}", f"--folder={tmp_path}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, process in enumerate(processes):
        output, errors = process.communicate(timeout=120)
        lines = {line.split(": ", 1)[1][8:22].strip(): line for line in output.splitlines() if ": " in line}
        assert lines["devices"].startswith(f"{socket.gethostname()} {i}: ok"), output + errors
        assert "2 x cpu; 4 over 2 processes" in lines["devices"]
        assert "4 devices, 4 MB each" in lines["all-reduce"]
        assert "the sum is right" in lines["all-reduce"]
        # Two share the cores, so that one may find itself slow: then it says so, and both still come to their ends.
        assert process.returncode == (3 if "FAILED" in output else 0), errors
