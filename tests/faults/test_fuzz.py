"""Ten thousand damaged files: every one is read or refused with one message, within 10 seconds and 2 GiB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import ROOT

# Cases of each target: the dear ones read a model.
CASES = {
    "configs": 3000,
    "sources": 1800,
    "rows": 1300,
    "runs": 1200,
    "tokens": 700,
    "exports": 1000,
    "stores": 400,
    "prompts": 600,
}
QUICK = {"configs": 200, "prompts": 100, "sources": 50, "stores": 50}


def fuzz(target: str, count: int, folder: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
    last = folder / "last"
    command = [sys.executable, "-m", "tests.faults.fuzz", target, str(count)]
    environment = {**clean, "JAX_PLATFORMS": "cpu", "FUZZ_LAST": str(last)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5000:]}\nlast: {last.read_text()}"
    assert f"{target}: {count} cases, 0 failed" in done.stdout


def test_there_are_ten_thousand() -> None:
    assert sum(CASES.values()) == 10_000


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_damaged_files_are_read_or_refused(target: str, tmp_path: Path) -> None:
    fuzz(target, CASES[target], tmp_path)


@pytest.mark.parametrize("target", QUICK)
def test_some_damaged_files_in_a_hurry(target: str, tmp_path: Path) -> None:
    fuzz(target, QUICK[target], tmp_path)
