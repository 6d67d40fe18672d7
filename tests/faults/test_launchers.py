"""The launchers run for real: several processes on this machine, one of them killed, all of them started again.

Slurm is stood in for by an `srun` that starts the tasks of a step with the variables that Slurm would set.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_processes import EACH_STEP, PATIENCE, ROOT, Teams, free_port

pytestmark = [pytest.mark.slow, pytest.mark.extended]

# Two tasks on one node; the port that jax derives from the job's number is free with all likelihood.
SRUN = """#!/bin/bash
for option in "$@"; do case $option in --*) shift ;; *) break ;; esac; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  pids[$task]=$!
done
highest=0
for task in 0 1; do
  code=0
  wait "${pids[$task]}" || code=$?
  [ "$code" -le "$highest" ] || highest=$code
done
exit "$highest"
"""


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Teams:
    """With `two`, the run of two processes that nothing disturbs."""
    teams = Teams(tmp_path_factory.mktemp("launchers"))
    teams.finish_team("two", 2, 1, *EACH_STEP)
    return teams


def trainers_below(pid: int) -> list[int]:
    """The processes that train, among the descendants of `pid`."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        found += [child] if b"smallcoder_jax.main" in words[:4] else trainers_below(child)
    return found


def kill_one_and_wait(teams: Teams, name: str, command: list[str], victim: int, **environment: str) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_", "SLURM_"))}
    clean |= {"JAX_COMPILATION_CACHE_DIR": str(teams.root / "xla"), **environment}
    arguments = [f"--config={teams.root / 'config.py'}", f"--workdir={teams.root / name}"]
    arguments += [f"--config.{override}" for override in EACH_STEP]
    with (teams.root / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=clean, stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while not (teams.root / name / "checkpoints" / "3" / "manifest.json").exists():
        assert process.poll() is None, teams.log(name)
        assert time.monotonic() < deadline, teams.log(name)
        time.sleep(0.01)
    os.kill(sorted(trainers_below(process.pid))[victim], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, teams.log(name)
    assert "resuming at step" in teams.log(name)
    np.testing.assert_array_equal(teams.losses(name), teams.losses("two"))
    teams.assert_same(name, "two")


def test_this_machine(teams: Teams) -> None:
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--retries=1", "--"]
    kill_one_and_wait(teams, "local", command, victim=1)
    assert "launch: attempt 2" in teams.log("local")


def test_slurm(teams: Teams) -> None:
    tools = teams.root / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    kill_one_and_wait(
        teams,
        "slurm",
        ["bash", "launch/slurm.sh"],
        victim=0,
        PATH=f"{tools}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        PLATFORM="cpu",
        RETRIES="1",
        SLURM_JOB_ID=str(free_port()),
    )
    assert "launch: attempt 2" in teams.log("slurm")
