"""Several processes as one run, each a program of its own with CPU devices of its own, joined over loopback.

They are killed one at a time and started again, on as many processes or on fewer: the losses are those of a run that
nothing disturbed, to the last bit on the same layout and to 1e-5 on another.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.base.distributed import HEARTBEAT_SECONDS
from smallcoder_jax.base.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from smallcoder_jax.train.checkpoint import verify_step
from tests.faults.runs import PATIENCE, ROOT, STEPS, Runs
from tests.faults.test_resume import ALL_AT_ONCE

EACH_STEP = ("checkpoint.every=1",)
SPLIT = ("mesh.data=1", "mesh.fsdp=-1")  # no process has a whole parameter


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Teams(Runs):
    """Starts runs of several processes with `devices` CPU devices each."""

    def team(self, name: str, processes: int, devices: int, *overrides: str) -> list[subprocess.Popen[bytes]]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
        clean |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.root / "xla")}
        clean |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        where, started = f"127.0.0.1:{free_port()}", []
        for process in range(processes):
            command = [
                *(sys.executable, "-m", "smallcoder_jax.main", f"--coordinator={where}"),
                *(f"--processes={processes}", f"--process={process}"),
                *(f"--config={self.root / 'config.py'}", f"--workdir={self.root / name}"),
                *(f"--config.{override}" for override in overrides),
            ]
            with (self.root / (f"{name}.log" if process == 0 else f"{name}.{process}.log")).open("ab") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=clean, stdout=log, stderr=log))
        return started

    def finish_team(self, name: str, processes: int, devices: int, *overrides: str) -> None:
        codes = [process.wait(PATIENCE) for process in self.team(name, processes, devices, *overrides)]
        assert codes == [0] * processes, self.log(name)

    def signal_one(
        self, name: str, victim: int, number: signal.Signals, step: int, processes: int, devices: int, *overrides: str
    ) -> tuple[list[int], float]:
        """Sends a signal to one process once `step` is saved. The exit codes of all, and the seconds until the last of
        the others had ended."""
        team = self.team(name, processes, devices, *EACH_STEP, *overrides)
        manifest = self.root / name / "checkpoints" / str(step) / "manifest.json"
        deadline = time.monotonic() + PATIENCE
        while not manifest.exists():
            assert all(process.poll() is None for process in team), self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.002)
        team[victim].send_signal(number)
        sent = time.monotonic()
        for index, process in enumerate(team):
            if index != victim:
                process.wait(PATIENCE)
        seconds = time.monotonic() - sent
        if number == signal.SIGSTOP:
            team[victim].kill()
        codes = [process.wait(PATIENCE) for process in team]
        assert step <= self.steps(name)[-1] < STEPS
        return codes, seconds

    def losses(self, name: str) -> np.ndarray:
        curve = self.curve(name)
        assert [row[0] for row in curve] == list(range(1, STEPS + 1))
        return np.array(curve)[:, 1:]


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Teams:
    """With `alone`, the run of one process, and `two`, that of two."""
    teams = Teams(tmp_path_factory.mktemp("teams"))
    teams.finish("alone", *EACH_STEP)
    teams.finish_team("two", 2, 1, *EACH_STEP)
    return teams


@pytest.mark.slow
def test_two_processes_train_as_one_does(teams: Teams) -> None:
    np.testing.assert_allclose(teams.losses("two"), teams.losses("alone"), rtol=1e-5)
    assert teams.data_state("two") == teams.data_state("alone")
    assert teams.evaluations("two")[0] == teams.evaluations("alone")[0]
    assert len(teams.evaluations("two")) == len(teams.evaluations("alone"))  # written by one process
    assert (teams.root / "two.1.log").read_text().count("step") == 0
    for step in teams.steps("two"):
        assert verify_step(teams.root / "two" / "checkpoints" / str(step)) == []


@pytest.mark.slow
def test_a_mistake_is_told_by_all_and_waited_for_by_none(teams: Teams) -> None:
    started = time.monotonic()
    team = teams.team("two", 2, 1, *EACH_STEP, "train.seed=2")
    assert [process.wait(PATIENCE) for process in team] == [EXIT_USER_ERROR] * 2
    assert time.monotonic() - started < PATIENCE / 2
    assert "holds another run" in teams.log("two")
    assert "holds another run" in (teams.root / "two.1.log").read_text()


@pytest.mark.slow
@pytest.mark.extended
def test_two_processes_train_as_one_does_with_workers_accumulation_and_best_fit(teams: Teams) -> None:
    teams.finish("alone_all", *EACH_STEP, *ALL_AT_ONCE)
    teams.finish_team("two_all", 2, 1, *EACH_STEP, *ALL_AT_ONCE, *SPLIT)
    np.testing.assert_allclose(teams.losses("two_all"), teams.losses("alone_all"), rtol=1e-5)
    assert teams.data_state("two_all") == teams.data_state("alone_all")


@pytest.mark.slow
@pytest.mark.extended
def test_samples_and_histograms_of_split_parameters(teams: Teams) -> None:
    logs = ("eval.sample_tokens=4", "log.histograms_every=5", "log.tensorboard=True")
    teams.finish("logs_alone", *logs)
    teams.finish_team("logs_two", 2, 2, *logs, *SPLIT)
    samples = [(teams.root / name / "text_samples.json").read_text() for name in ("logs_two", "logs_alone")]
    assert samples[0] == samples[1]
    assert len(list((teams.root / "logs_two" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_stops_all_at_one_step(teams: Teams, victim: int) -> None:
    name = f"stopped{victim}"
    codes, _ = teams.signal_one(name, victim, signal.SIGTERM, 3, 2, 1)
    assert codes == [EXIT_INTERRUPTED] * 2
    assert teams.curve(name) == teams.curve("two")[: teams.steps(name)[-1]]
    teams.finish_team(name, 2, 1, *EACH_STEP)
    teams.assert_same(name, "two")


@pytest.mark.slow
@pytest.mark.extended
def test_sigterm_in_an_evaluation_is_heard_by_all(teams: Teams) -> None:
    codes, _ = teams.signal_one("in_evaluation", 1, signal.SIGTERM, 3, 2, 1, "eval.every=1", "eval.batches=0")
    assert codes == [EXIT_INTERRUPTED] * 2
    teams.finish_team("in_evaluation", 2, 1, *EACH_STEP, "eval.every=1", "eval.batches=0")
    assert teams.curve("in_evaluation") == teams.curve("two")
    evaluated = [int(row.split(",")[0]) for row in teams.evaluations("in_evaluation")[1:]]
    assert evaluated == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.extended
def test_two_processes_killed_one_at_a_time(teams: Teams) -> None:
    for victim, step in ((1, 2), (0, 5)):
        codes, seconds = teams.signal_one("killed", victim, signal.SIGKILL, step, 2, 1)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] in (1, -signal.SIGABRT), teams.log("killed")
        assert seconds < HEARTBEAT_SECONDS + 30
    teams.finish_team("killed", 2, 1, *EACH_STEP)
    teams.assert_same("killed", "two")


@pytest.mark.slow
@pytest.mark.extended
def test_a_peer_that_hangs_does_not_hang_the_others(teams: Teams) -> None:
    codes, seconds = teams.signal_one("silent", 1, signal.SIGSTOP, 2, 2, 1)
    assert codes[0] in (1, -signal.SIGABRT), teams.log("silent")
    assert seconds < HEARTBEAT_SECONDS + 30
    teams.finish_team("silent", 2, 1, *EACH_STEP)
    teams.assert_same("silent", "two")


@pytest.mark.slow
@pytest.mark.extended
def test_saved_on_four_processes_and_finished_on_others(teams: Teams) -> None:
    teams.finish_team("four", 4, 1, *EACH_STEP, *SPLIT)
    np.testing.assert_allclose(teams.losses("four"), teams.losses("alone"), rtol=1e-5)
    codes, seconds = teams.signal_one("moved", 2, signal.SIGKILL, 4, 4, 1, *SPLIT)
    assert set(codes) <= {1, -signal.SIGABRT, -signal.SIGKILL}, teams.log("moved")
    assert seconds < HEARTBEAT_SECONDS + 30
    for name, processes, devices in (("on4", 4, 1), ("on2", 2, 1), ("on2x4", 2, 4), ("on1", 1, 1), ("on1x8", 1, 8)):
        shutil.copytree(teams.root / "moved", teams.root / name, symlinks=True)
        teams.finish_team(name, processes, devices, *EACH_STEP, *SPLIT)
        assert "resuming at step" in teams.log(name)
        if processes == 4:
            teams.assert_same(name, "four")
        np.testing.assert_allclose(teams.losses(name), teams.losses("four"), rtol=1e-5)
        assert teams.data_state(name) == teams.data_state("four")
        assert verify_step(Path(teams.root / name / "checkpoints" / str(STEPS))) == []
