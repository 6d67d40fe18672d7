"""kill -9 at twenty random moments of a save: what counts as saved is whole, and nothing is lost."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from smallcoder_jax.loading import load
from smallcoder_jax.train.checkpoint import verify_step
from tests.faults.runs import PATIENCE, Runs

KILLS = 20
GIVEN = ("train.steps=40", "checkpoint.every=1", "checkpoint.keep=3", "eval.every=0")


def kill_in_a_save(runs: Runs, name: str, moment: float) -> int:
    """Starts the run and kills it `moment` seconds after its first save began; returns the newest whole step."""
    folder = runs.root / name / "checkpoints"
    before = set(folder.glob("[0-9]*")) if folder.exists() else set()
    process = runs.start(name, *GIVEN)
    deadline = time.monotonic() + PATIENCE
    while not (folder.exists() and {path for path in folder.glob("[0-9]*") if path not in before}):
        assert process.poll() is None, runs.log(name)
        assert time.monotonic() < deadline, runs.log(name)
        time.sleep(0.001)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) in (-signal.SIGKILL, 0)
    runs.keepers[name].wait(PATIENCE)
    for step in runs.steps(name):
        assert verify_step(folder / str(step)) == []
    return max(runs.steps(name), default=0)


@pytest.mark.slow
@pytest.mark.extended
def test_killed_at_random_moments_of_a_save(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.finish("straight", *GIVEN)
    seed = random.randrange(2**32)
    print(f"moments drawn with seed {seed}")
    moments, reached = random.Random(seed), 0
    for _ in range(KILLS):
        newest = kill_in_a_save(runs, "killed", moments.uniform(0.0, 0.12))
        assert newest >= reached  # what was saved once stays
        reached = newest
    runs.finish("killed", *GIVEN)
    assert runs.curve("killed") == runs.curve("straight")
    mine, theirs = (load(runs.root / name, step=40).params for name in ("killed", "straight"))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert runs.data_state("killed", 40) == runs.data_state("straight", 40)
