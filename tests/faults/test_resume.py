"""Ten steps in one go, against killed and continued: the same losses and parameters, to the last bit.

Every run is a process of its own, as a user starts it. All share one prepared folder and one compilation cache.
"""

from __future__ import annotations

import signal

import pytest

from smallcoder_jax.base.errors import EXIT_INTERRUPTED
from tests.faults.runs import STEPS, Runs

ALL_AT_ONCE = ("data.workers=2", "train.microbatch_size=2", "data.packing=best_fit", "data.repository_order=True")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With `straight`, the plain run that nothing interrupts."""
    runs = Runs(tmp_path_factory.mktemp("resume"))
    runs.finish("straight")
    return runs


def kill_and_compare(runs: Runs, straight: str, name: str, *overrides: str) -> None:
    assert runs.stop_at(name, 5, signal.SIGKILL, *overrides) == -signal.SIGKILL
    reached = runs.steps(name)[-1]
    runs.finish(name, *overrides)
    assert f"resuming at step {reached} " in runs.log(name)
    runs.assert_same(name, straight)


def test_killed_and_continued(runs: Runs) -> None:
    kill_and_compare(runs, "straight", "killed")
    assert runs.data_state("killed", 5)["taken"] > 0  # rows were packed ahead and only partly used


@pytest.mark.slow
def test_sigterm_saves_and_continues(runs: Runs) -> None:
    assert runs.stop_at("stopped", 3, signal.SIGTERM) == EXIT_INTERRUPTED
    reached = runs.steps("stopped")[-1]
    assert runs.curve("stopped") == runs.curve("straight")[:reached]  # the last step taken is the one saved
    runs.finish("stopped")
    runs.assert_same("stopped", "straight")


@pytest.mark.slow
def test_killed_and_continued_with_workers_accumulation_and_best_fit(runs: Runs) -> None:
    runs.finish("straight_all", *ALL_AT_ONCE)
    assert runs.curve("straight_all") != runs.curve("straight")
    kill_and_compare(runs, "straight_all", "killed_all", *ALL_AT_ONCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "data.workers=2",
        "train.microbatch_size=2",
        "data.packing=best_fit",
        "data.packing=document",
        "compute.dtype=bfloat16",
    ],
)
def test_killed_and_continued_with(runs: Runs, override: str) -> None:
    name = override.replace("=", "_")
    runs.finish(f"straight_{name}", override)
    kill_and_compare(runs, f"straight_{name}", f"killed_{name}", override)
    assert runs.curve(f"killed_{name}") == runs.curve(f"straight_{name}")


def test_a_finished_run_is_left_as_it_is(runs: Runs) -> None:
    before = runs.curve("straight")
    runs.finish("straight")
    assert runs.curve("straight") == before
    assert runs.steps("straight") == [5, STEPS]
