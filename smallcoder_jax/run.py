"""Runs a config: prepares the data, makes the stage's task, trains, and writes the report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from smallcoder_jax import loading
from smallcoder_jax.base import distributed
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.faults import NONE, Faults
from smallcoder_jax.base.files import reason
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.base.runtime import configure_jax
from smallcoder_jax.base.terminal import Terminal, human_count
from smallcoder_jax.config import KINDS, Config, eval_rows, evaluated_on, to_dict
from smallcoder_jax.evaluate.sound import check_measures, check_parameters
from smallcoder_jax.models.families import family_of, published
from smallcoder_jax.preflight.examine import Report, examine
from smallcoder_jax.preflight.show import table
from smallcoder_jax.preflight.target import target_here, target_of
from smallcoder_jax.report.page import generate_command, write_report
from smallcoder_jax.report.run_folder import RunFolder, compare_identity
from smallcoder_jax.stages.shared import next_token
from smallcoder_jax.stages.shared.start import load_start, with_base
from smallcoder_jax.train.checkpoint import load_params
from smallcoder_jax.train.evaluation import on_this_device
from smallcoder_jax.train.loop import Outcome, Trainer
from smallcoder_jax.train.program import make_program
from smallcoder_jax.train.stop import interruptible
from smallcoder_jax.train.task import Task, run_identity
from smallcoder_jax.train.whereabouts import data_folders

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run: its folder, last step and results."""

    folder: Path
    step: int
    interrupted: bool
    evaluation: dict[str, float]
    tokens_seen: int


def train(config: Config, workdir: Path, *, faults: Faults = NONE, allow_changed: tuple[str, ...] = ()) -> Run:
    """Trains `config` in `workdir`, or continues the run that is there.

    `faults` are injected into the run (`--inject`). `allow_changed` names the parts of the run's identity that may
    differ from the recorded ones.

    Raises UserError when the data cannot be obtained, or when `workdir` is not writable, is in use or holds another
    run. Raises Interrupted when SIGTERM arrives before there is anything to save, and Diverged when training diverges.
    """
    configure_jax()
    if config.eval.split != "validation":
        raise UserError(f"eval.split={config.eval.split!r} is for --mode=evaluate, after training; leave it out")
    folder = RunFolder(workdir)
    with contextlib.ExitStack() as stack:
        # Checked first, because preparing data can take hours.
        folder.check_shared(distributed.from_first(lambda: stack.enter_context(folder.locked())))
        output = sys.stderr if distributed.is_first() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(disk_explained(workdir))
        stack.enter_context(memory_explained(config))
        with interruptible():
            faults.reach("prepare")
            task = _make_task(config, Progress(output))
            terminal = Terminal(output, total_steps=config.train.steps, log_every=config.train.log_every)
            trainer = Trainer(config, folder, task, terminal, faults=faults, allow_changed=allow_changed)
        outcome = trainer.run()
        if distributed.is_first():
            write_report(folder, task.accounting, _results(config, outcome, task.references))
            _say_end(config, folder, outcome, terminal)
    return Run(workdir, outcome.step, outcome.interrupted, outcome.evaluation, outcome.tokens_seen)


def evaluate_run(workdir: Path, config: Config, step: str | None = None) -> dict[str, Any]:
    """The measures of the stage of `config` for a run or an export on held-out data, and the step.

    The measures come from `measure` of the stage's module. For a run, the result is also appended to
    `evaluations.jsonl`. Raises UserError when the config's data or row length do not fit the model, and CheckFailed
    when the model or a measure is not finite.
    """
    configure_jax()
    loaded, progress, folder = loading.load(workdir, step=step), Progress(sys.stderr), RunFolder(workdir)
    if "run" in loaded.info:
        config = _at_hand(config, folder, loaded.info, loaded.info["run"])
    path = loaded.origin["path"]
    check_parameters(path, {**loaded.params, "head": loaded.head})
    measures = check_measures(path, _stage(config).measure(config, loaded, progress))
    result = {"step": loaded.origin["step"], **measures}
    if "run" in loaded.info:
        try:
            folder.add_evaluation(result)
        except OSError as error:
            progress.note(f"{folder.evaluations_jsonl} cannot be written ({reason(error)}); the result is only shown")
    return result


def _at_hand(config: Config, folder: RunFolder, meta: Mapping[str, Any], run: Mapping[str, Any]) -> Config:
    """The config with the current paths of its data and of the models that it refers to.

    The run may have been moved since it recorded them, with or without its data and models. Paths that cannot be found
    stay as they are. `meta` is the meta.json of the checkpoint, and `run` is the content of run.json.
    """
    identity = meta["identity"]
    if config.data.dir == meta["config"]["data"]["dir"] and not Path(config.data.dir).expanduser().is_dir():
        places = [place for place in data_folders(folder, config, run) if place.is_dir()]
        if places:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(places[0])))
    of_data = identity.get("data", {})
    for section, name, wanted in (
        ("stage", "start", identity.get("start")),
        ("distill", "teacher", of_data.get("teacher")),
        ("rl", "reward_model", of_data.get("judge")),
    ):
        values = getattr(config, section)
        recorded = getattr(values, name)
        if not recorded or wanted is None:
            continue
        with contextlib.suppress(UserError):  # the code that needs the model reports that it is missing
            found = loading.find_model(folder.path, recorded, wanted, None, f"{section}.{name}={recorded}")
            config = dataclasses.replace(config, **{section: dataclasses.replace(values, **{name: str(found)})})
    return config


def reevaluate(config: Config, step_folder: Path, meta: dict[str, Any]) -> float:
    """The held-out loss of a checkpoint under its stage, on data that is prepared again (see `evaluate.verify`).

    Raises UserError when the identity of the run would now differ from the checkpoint's.
    """
    configure_jax()
    folder = RunFolder(step_folder.parents[1])
    config = _at_hand(config, folder, meta, folder.read_run_json())
    with open(os.devnull, "w") as silent:
        task = _make_task(config, Progress(silent))
    if differences := compare_identity(meta["identity"], run_identity(config, task)):
        raise UserError(f"data or start model differ from the checkpoint's: {'; '.join(differences)}")
    program = make_program(config, task.loss_fn, jax.devices()[:1], frozen=task.frozen, frozen_model=task.frozen_model)
    params, _ = load_params(step_folder, program.state.params)
    parts = {**jax.device_put(task.frozen, program.frozen_shardings), **params}
    evaluation = on_this_device(config.compute, task.loss_fn, parts, rows=eval_rows(config), limit=config.eval.batches)
    found = task.evaluate(dataclasses.replace(evaluation, loss_alone=True))
    assert found is not None  # None means that a stop was requested, which cannot happen here
    return found["loss"]


def _make_task(config: Config, progress: Progress) -> Task:
    loaded = load_start(config)
    task = with_base(config, loaded, _stage(config).make_task(config, loaded, progress))
    return dataclasses.replace(task, logged=family_of(config.model).logged(config.model))


def _stage(config: Config) -> Any:
    """The module of the config's stage. It is imported on demand, because no stage needs another."""
    return importlib.import_module(f"smallcoder_jax.stages.{config.stage.name}")


def preflight(config: Config, topology: str, tokens: float | None = None, price: float | None = None) -> Report:
    """The resources that training `config` on a topology takes (see `preflight.examine`).

    Neither the devices nor the data need to be available. Raises UserError for an unknown topology, and when its
    compiler is not installed.
    """
    if not config.stage.kind.next_token:
        known = " and ".join(name for name, kind in KINDS.items() if kind.next_token)
        raise UserError(f"preflight supports the stages {known}, but not yet {config.stage.name}")
    return examine(config, next_token.make_loss(config), target_of(topology), tokens=tokens, price=price)


@contextlib.contextmanager
def disk_explained(workdir: Path) -> Iterator[None]:
    """Turns a lack of disk space, inodes or permissions in the body into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise UserError(
            f"{error.filename or workdir} cannot be written: {error.strerror}. Free space (df) or files (df -i) there, "
            "or choose another --workdir; what was saved is intact and the same command continues"
        ) from error


@contextlib.contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Turns running out of device memory in the body into a UserError. Its message has the preflight report of the same
    step on these devices, and the nearest setting that fits.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not config.stage.kind.next_token:
            raise UserError(f"out of memory: {error}\n\nlower train.microbatch_size, or set compute.remat") from error
        report = examine(config, next_token.make_loss(config), target_here(jax.devices()), tokens=None, price=None)
        if report.remedy:
            advice = f"nearest setting that fits: {' '.join(report.remedy)}"
        elif report.memory.fits:
            advice = (
                "by this estimate the step fits: another program may hold memory, or evaluation or samples may need "
                "more"
            )
        else:
            advice = "nothing that was tried fits; take more devices or a smaller model"
        raise UserError(f"out of memory: {error}\n\n{table(report)}\n\n{advice}") from error


def _results(config: Config, outcome: Outcome, references: dict[str, float]) -> dict[str, Any]:
    """The `results` for `write_report`. The model was evaluated on only a part of the text that the compressors were
    given, so the names of both results say which text they cover.
    """
    return {
        "steps": outcome.step,
        "tokens seen": human_count(outcome.tokens_seen),
        **{name.replace("_", " "): round(value, 4) for name, value in outcome.evaluation.items()},
        **({"evaluated on": evaluated_on(config)} if outcome.evaluation else {}),
        **(
            {
                "bits per byte of compressors, on all held-out files": {
                    name: round(value, 4) for name, value in references.items()
                }
            }
            if references
            else {}
        ),
    }


def _say_end(config: Config, folder: RunFolder, outcome: Outcome, terminal: Terminal) -> None:
    if outcome.interrupted:
        title = f"interrupted at step {outcome.step} of {config.train.steps}; saved, the same command continues"
    else:
        title = f"trained {config.name}: {outcome.step} steps, {human_count(outcome.tokens_seen)} tokens"
    terminal.end_summary(
        title,
        {name: f"{value:.4f}" for name, value in outcome.evaluation.items()},
        {"run": folder.path, "report": folder.report_html, "checkpoints": folder.checkpoints},
        next_commands(config, folder.path),
    )


def next_commands(config: Config, path: Path) -> list[str]:
    """Commands that can be run next on a run. Only commands that accept this run are listed."""
    quoted = shlex.quote(str(path))
    try:
        exportable = not config.stage.kind.head and bool(published(config.model).model_type(config.model))
    except UserError:
        exportable = False
    return [
        generate_command(path, to_dict(config)),
        *([f"python -m tools.export --checkpoint {quoted}"] if exportable else []),
        f"python -m tools.verify_models --run {quoted}",
    ]
