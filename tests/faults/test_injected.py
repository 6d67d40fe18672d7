"""Faults that `--inject` makes: a stated message and exit code, and afterwards nothing is lost."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from smallcoder_jax.base.errors import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_STALLED, EXIT_USER_ERROR
from smallcoder_jax.train.checkpoint import verify_step
from tests.faults.runs import STEPS, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With `straight`, the plain run that nothing interrupts."""
    runs = Runs(tmp_path_factory.mktemp("injected"))
    runs.finish("straight")
    return runs


@pytest.mark.parametrize(
    "place",
    [
        "save:2",
        pytest.param("manifest:2", marks=pytest.mark.slow),
        pytest.param("checkpoint:1", marks=pytest.mark.slow),
    ],
)
def test_killed_in(runs: Runs, place: str) -> None:
    name = f"killed_{place.replace(':', '_')}"
    runs.finish(name, f"--inject=kill@{place}", "checkpoint.every=2", code=-signal.SIGKILL)
    assert runs.steps(name) == [2]
    runs.finish(name)
    assert "resuming at step 2 " in runs.log(name)
    runs.assert_same(name, "straight")


@pytest.mark.parametrize(
    "place", ["compile", *(pytest.param(place, marks=pytest.mark.slow) for place in ("step:4", "evaluation", "save"))]
)
def test_sigterm_in(runs: Runs, place: str) -> None:
    name = f"sigterm_{place.replace(':', '_')}"
    runs.finish(name, f"--inject=sigterm@{place}", code=EXIT_INTERRUPTED)
    assert "interrupted at step" in runs.log(name)
    assert len(runs.steps(name)) >= 1
    if place == "evaluation":  # gives way to the save, and is made up for
        assert (runs.steps(name), len(runs.evaluations(name))) == ([5], 1)
    runs.finish(name)
    runs.assert_same(name, "straight")


@pytest.mark.slow
def test_sigterm_before_there_is_anything_to_save(runs: Runs) -> None:
    runs.finish("early", "--inject=sigterm@prepare", code=EXIT_INTERRUPTED)
    assert "interrupted before the first step; nothing was lost" in runs.log("early")
    runs.finish("early")
    runs.assert_same("early", "straight")


def test_a_flipped_bit_is_refused_and_the_step_before_used(runs: Runs) -> None:
    runs.finish("flipped", "--inject=bitflip@checkpoint:2,kill@save:3", "checkpoint.every=2", code=-signal.SIGKILL)
    damaged = runs.root / "flipped" / "checkpoints" / "4"
    assert len(verify_step(damaged)) == 1
    runs.finish("flipped", "checkpoint.every=2")
    log = runs.log("flipped")
    assert f"{verify_step(damaged.with_name('4.damaged'))[0].split(': ')[1]}" in log
    assert f"checkpoint {damaged} is damaged" in log
    assert "resuming at step 2 " in log
    assert verify_step(damaged) == []  # written anew when the run came to it again
    runs.assert_same("flipped", "straight")


def test_a_full_disk_ends_the_run_and_leaves_the_step_before(runs: Runs) -> None:
    runs.finish("full", "--inject=diskfull@save:2", "checkpoint.every=2", code=EXIT_USER_ERROR)
    said = runs.log("full").splitlines()
    assert said[-1].startswith("error: could not save a checkpoint under")
    assert not [line for line in said if "Traceback" in line or "site-packages" in line]
    assert runs.steps("full") == [2]
    assert verify_step(runs.root / "full" / "checkpoints" / "2") == []
    runs.finish("full")
    runs.assert_same("full", "straight")


def test_a_nan_batch_is_skipped_and_kept(runs: Runs) -> None:
    runs.finish("nan", "--inject=nan@step:3", "checkpoint.every=1")
    assert runs.steps("nan") == [1, 2, *range(4, STEPS + 1)]  # what a skipped update leaves waits for one that is made
    losses = [loss for _, loss, _, _ in runs.curve("nan")]
    assert [step for step, loss in enumerate(losses, 1) if loss is None] == [3]
    assert losses[:2] == [loss for _, loss, _, _ in runs.curve("straight")][:2]
    kept = runs.root / "nan" / "skipped" / "step-3-process-0.npz"
    with np.load(kept, allow_pickle=False) as batch:
        assert batch["tokens"].shape == (8, 64)
        assert np.isnan(batch["loss_weights"]).all()
    facts = json.loads(kept.with_suffix(".json").read_text())
    assert facts["reason"] == "loss or gradient is not finite"
    assert facts["data_state"] == runs.data_state("nan", 2)  # what draws this batch again
    assert json.loads((runs.root / "nan" / "training_info.json").read_text())["skipped_updates"] == 1
    assert "step 3: update skipped" in runs.log("nan")


@pytest.mark.slow
def test_too_many_skipped_updates_stop_the_run(runs: Runs) -> None:
    faults = "--inject=nan@step:3,nan@step:4,nan@step:6"
    runs.finish("diverged", faults, "guard.max_skipped=2", "checkpoint.every=2", code=EXIT_DIVERGED)
    assert "2 updates in a row were skipped (guard.max_skipped), the last at step 4" in runs.log("diverged")
    assert runs.steps("diverged") == [2]
    runs.finish("diverged")
    runs.assert_same("diverged", "straight")


@pytest.mark.parametrize(
    ("place", "waited_for", "stack"),
    [
        ("data:6", "a batch (guard.data_seconds)", "prefetch.py"),
        pytest.param("save:2", "a checkpoint (guard.save_seconds)", "checkpoint.py", marks=pytest.mark.slow),
        pytest.param("manifest:1", "a checkpoint (guard.save_seconds)", "checkpoint.py", marks=pytest.mark.slow),
    ],
)
def test_a_stall_ends_the_run_and_names_what_it_waited_for(runs: Runs, place: str, waited_for: str, stack: str) -> None:
    name = f"stalled_{place.replace(':', '_')}"
    limits = ("guard.data_seconds=5", "guard.save_seconds=5", "checkpoint.every=2")
    runs.finish(name, f"--inject=stall@{place}", *limits, code=EXIT_STALLED)
    assert f"stalled: waited more than 5 s for {waited_for}" in runs.log(name)
    (stacks,) = (runs.root / name).glob("stacks-*.txt")
    assert stack in stacks.read_text()
    runs.finish(name)
    runs.assert_same(name, "straight")


@pytest.mark.slow
def test_a_process_that_does_not_end_after_sigterm_is_ended(runs: Runs) -> None:
    limits = ("guard.stop_seconds=3",)
    runs.finish("slow_end", "--inject=sigterm@step:4,stall@manifest", *limits, code=EXIT_STALLED)
    assert "waited more than 3 s for the end, after a signal (guard.stop_seconds)" in runs.log("slow_end")
    runs.finish("slow_end")
    runs.assert_same("slow_end", "straight")


@pytest.mark.slow
def test_what_may_differ_is_named(runs: Runs) -> None:
    runs.finish("changed", "train.steps=5", "optimizer.schedule=constant")
    given = ("optimizer.schedule=constant", f"train.steps={STEPS}", "optimizer.weight_decay=0.2", "train.z_loss=0.1")
    runs.finish("changed", *given, "--allow-changed=optimizer", code=EXIT_USER_ERROR)
    assert "train.z_loss: the run has 0.0, now 0.1" in runs.log("changed")
    runs.finish("changed", *given, "--allow-changed=optimizer,train.z_loss")
    assert "allowed to differ: optimizer.weight_decay: the run has 0.1, now 0.2" in runs.log("changed")
    assert runs.steps("changed")[-1] == STEPS
