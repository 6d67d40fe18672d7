"""From a config to a trained run: prepare the data, make the stage's task, train, report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from smallcoder_jax import distributed, loading
from smallcoder_jax.config import Config, eval_rows, evaluated_on
from smallcoder_jax.data import pipeline
from smallcoder_jax.data.prepare import Prepared, prepare
from smallcoder_jax.data.progress import Progress
from smallcoder_jax.errors import UserError
from smallcoder_jax.evaluate.bits_per_byte import held_out_references
from smallcoder_jax.evaluate.perplexity import evaluate
from smallcoder_jax.faults import NONE, Faults
from smallcoder_jax.preflight.examine import Report, examine
from smallcoder_jax.preflight.show import table
from smallcoder_jax.preflight.target import target_here, target_of
from smallcoder_jax.runtime import configure_jax
from smallcoder_jax.stages import pretrain
from smallcoder_jax.train.loop import Outcome, Trainer
from smallcoder_jax.train.report import write_report
from smallcoder_jax.train.run_folder import RunFolder
from smallcoder_jax.train.stop import interruptible
from smallcoder_jax.train.terminal import Terminal, human_count


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run: its folder, and what it reached."""

    folder: Path
    step: int
    interrupted: bool
    evaluation: dict[str, float]
    tokens_seen: int


def train(config: Config, workdir: Path, *, faults: Faults = NONE, allow_changed: tuple[str, ...] = ()) -> Run:
    """Trains `config` in `workdir`, or continues the run that is there.

    `faults` are tried on it (`--inject`). `allow_changed` names the parts of the run's identity that may differ from
    what is recorded. Raises UserError when the data cannot be had, or when `workdir` cannot be written, is in use or
    holds another run; Interrupted when SIGTERM comes before there is anything to save; Diverged.
    """
    configure_jax()
    folder = RunFolder(workdir)
    with contextlib.ExitStack() as stack:
        # First: preparing data can take hours.
        folder.check_shared(distributed.from_first(lambda: stack.enter_context(folder.locked())))
        output = sys.stderr if distributed.is_first() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(memory_explained(config))
        with interruptible():
            faults.reach("prepare")
            prepared = _prepare_on_all(config, Progress(output))
            references = held_out_references(prepared) if distributed.is_first() else {}
            terminal = Terminal(output, total_steps=config.train.steps, log_every=config.train.log_every)
            task = pretrain.make_task(config, prepared, references)
            trainer = Trainer(config, folder, task, terminal, faults=faults, allow_changed=allow_changed)
        outcome = trainer.run()
        if distributed.is_first():
            write_report(folder, prepared.accounting, _results(config, outcome, references))
            _say_end(config, folder, outcome, terminal)
    return Run(workdir, outcome.step, outcome.interrupted, outcome.evaluation, outcome.tokens_seen)


def evaluate_run(workdir: Path, config: Config, step: str | None = None) -> dict[str, Any]:
    """Loss, perplexity, accuracy and bits per byte of a run on the whole validation split, beside the compressors.

    `workdir` may be an export too. `data` says what was evaluated on: an export does not know its own validation split.
    Raises UserError when the config's data or row length do not fit the model.
    """
    configure_jax()
    loaded = loading.load(workdir, step=step)
    if config.train.sequence_length > loaded.model.context:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} is longer than the context of the model in "
            f"{workdir}, {loaded.model.context}; give the config and flags that it was trained with"
        )
    prepared = prepare(config, Progress(sys.stderr))
    if prepared.tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(f"{workdir} was trained with another tokenizer than that of {prepared.tokenizer_folder}")
    fingerprint = prepared.manifest.fingerprint
    if "identity" in loaded.info:  # a run; an export carries none
        trained_on = loaded.info["identity"]["data"]["fingerprint"]
        if trained_on != fingerprint:
            raise UserError(
                f"{workdir} was trained on data with the fingerprint {trained_on}, but '{config.data.sources}' has "
                f"{fingerprint}, whose held-out files may be among those trained on; give the config and flags that "
                "it was trained with"
            )
    batches = pipeline.validation_batches(
        prepared.manifest,
        prepared.tokens_folder,
        prepared.tokenizer,
        sequence_length=config.train.sequence_length,
        batch_size=eval_rows(config),
        rows=range(eval_rows(config)),
        limit_batches=0,
    )
    return {
        **evaluate(loaded.model, loaded.compute, loaded.params, batches),
        "references": held_out_references(prepared),
        "data": {
            "sources": config.data.sources,
            "fingerprint": fingerprint,
            "sequence_length": config.train.sequence_length,
        },
    }


def _prepare_on_all(config: Config, progress: Progress) -> Prepared:
    """Process 0 prepares the data; the others find them in a shared folder, or else prepare their own.

    Raises UserError where the processes come to have different data.
    """
    made: list[Prepared] = []

    def make() -> str:
        made.append(prepare(config, progress))
        return made[0].manifest.fingerprint

    fingerprint = distributed.from_first(make)
    prepared = made[0] if made else prepare(config, progress)
    if prepared.manifest.fingerprint != fingerprint:
        raise UserError(
            f"the data in '{config.data.dir}' of this machine have the fingerprint {prepared.manifest.fingerprint}, "
            f"those of process 0 {fingerprint}: '{config.data.sources}' differs between the machines. Set data.dir to "
            "a folder that all of them share, or copy the one of process 0"
        )
    return prepared


def preflight(config: Config, topology: str, tokens: float | None = None, price: float | None = None) -> Report:
    """What training `config` on a topology takes (see `preflight.examine`); nothing of it needs to be here, nor data.

    Raises UserError on a topology that is not known, and where its compiler is not installed.
    """
    return examine(config, pretrain.make_loss(config), target_of(topology), tokens=tokens, price=price)


@contextlib.contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Turns a device's want of memory in the body into a UserError: the preflight of the same step on these devices,
    and the nearest setting that fits.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        report = examine(config, pretrain.make_loss(config), target_here(jax.devices()), tokens=None, price=None)
        if report.remedy:
            advice = f"nearest setting that fits: {' '.join(report.remedy)}"
        elif report.memory.fits:
            advice = "by this the step fits: another program may hold memory, or evaluation or samples may need more"
        else:
            advice = "nothing that was tried fits; take more devices or a smaller model"
        raise UserError(f"out of memory: {error}\n\n{table(report)}\n\n{advice}") from error


def _results(config: Config, outcome: Outcome, references: dict[str, float]) -> dict[str, Any]:
    """The results of `write_report`. The model was evaluated on a part of what the compressors were given: both say."""
    return {
        "steps": outcome.step,
        "tokens seen": human_count(outcome.tokens_seen),
        **{name.replace("_", " "): round(value, 4) for name, value in outcome.evaluation.items()},
        **({"evaluated on": evaluated_on(config)} if outcome.evaluation else {}),
        "bits per byte of compressors, on all held-out files": {
            name: round(value, 4) for name, value in references.items()
        },
    }


def _say_end(config: Config, folder: RunFolder, outcome: Outcome, terminal: Terminal) -> None:
    path = folder.path
    if outcome.interrupted:
        title = f"interrupted at step {outcome.step} of {config.train.steps}; saved, the same command continues"
    else:
        title = f"trained {config.name}: {outcome.step} steps, {human_count(outcome.tokens_seen)} tokens"
    terminal.end_summary(
        title,
        {name: f"{value:.4f}" for name, value in outcome.evaluation.items()},
        {"run": path, "report": folder.report_html, "checkpoints": folder.checkpoints},
        [
            f"python -m tools.generate --checkpoint {path} --prompt 'def main():'",
            f"python -m tools.export --checkpoint {path}",
            f"python -m tools.verify_models --run {path}",
        ],
    )
