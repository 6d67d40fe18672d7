"""Trains a chain of stages. Each starts from the model of the previous one, and all share one tokenizer.

WORKDIR/tokenizer/         the tokenizer of all stages
WORKDIR/STAGE/             the run folder of each stage
WORKDIR/stages.json        the ledger of finished stages: for each, a key of its inputs, its duration and its measures
WORKDIR/stages.html        the table and the charts of all stages
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax import loading, run
from smallcoder_jax.base.artifacts import new_folder, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config, Measure, nearest, to_dict
from smallcoder_jax.config.stages import StageKind
from smallcoder_jax.configfile import PROJECT, load_config
from smallcoder_jax.data.tokens.train_tokenizer import make_tokenizer
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.report.page import write_stages_report
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.stages import sft
from smallcoder_jax.tokenizers import chat

CONFIGS = PROJECT / "configs"
# In the order of training. Each stage but the first has a file in configs/stages/, which names its measures.
STAGES = ("tokenizer", "language", "code", "tools", "reward", "dpo", "ppo", "grpo", "distill")
ERRORS = 2  # standard errors; a smaller difference is taken for noise


class Change(NamedTuple):
    """The values of a measure before and after a stage. `before` is None when there was no model before.
    `standard_error` is the standard error of the difference, where it is known.
    """

    before: float | None
    after: float
    standard_error: float | None = None


def fault(measure: Measure, change: Change) -> str | None:
    """The requirement of `measure` that `change` does not meet, in words; None when all are met."""
    before, after, error = change
    found = f"{measure.name} was {before}, is {after:.4g}"
    if measure.least is not None and not after >= measure.least:
        return f"{found}, wanted at least {measure.least}"
    if measure.most is not None and not after <= measure.most:
        return f"{found}, wanted at most {measure.most}"
    if not measure.better or before is None:
        return None
    gained = after - before if measure.better == "higher" else before - after
    if error is not None and not gained > ERRORS * error:
        return f"{found}, wanted {measure.better} by more than its noise, {ERRORS} x {error:.4g}"
    return None if gained > 0 else f"{found}, wanted {measure.better}"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage and its config, in which the start and other models that it needs are filled in."""

    stage: str
    folder: Path
    config: Config

    @property
    def measures(self) -> list[Measure]:
        return [Measure.parsed(text) for text in self.config.stage.measures]


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished stage, its duration and how each measure changed."""

    stage: str
    seconds: float
    measures: dict[str, Change]


def plan(variant: str, stages: Sequence[str], workdir: Path, overrides: Sequence[str]) -> list[Planned]:
    """The stages that train a model, in order. Raises UserError for an unknown stage, for a stage that comes before one
    that it needs, and for a wrong config.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"--stages: '{stage}' is no stage; {nearest(stage, list(STAGES))}")
    if list(stages) != sorted(set(stages), key=STAGES.index):
        raise UserError(f"--stages={','.join(stages)}: expected each once, in the order {','.join(STAGES)}")
    planned: list[Planned] = []
    for stage in [stage for stage in stages if stage != "tokenizer"]:
        file = f"{CONFIGS / 'stages' / f'{stage}.py'}:{variant}"
        extra = [f"--config.tokenizer.path={workdir / 'tokenizer'}"] if "tokenizer" in stages else []
        extra += _models_before(load_config(file, list(overrides)).stage.kind, stage, planned)
        planned.append(Planned(stage, workdir / stage, load_config(file, [*extra, *overrides])))
    return planned


def _models_before(kind: StageKind, stage: str, planned: Sequence[Planned]) -> list[str]:
    """The flags that name the models that a stage needs, chosen among the stages planned before it."""
    policies = [each for each in planned if each.config.stage.kind.policy]
    pretrained = [each for each in policies if not each.config.stage.kind.needs]
    judges = [each for each in planned if each.config.stage.kind.head]
    flags = []
    if "teacher" in kind.needs:
        if not policies:
            raise UserError(f"--stages: {stage} needs a teacher: a stage before it that trains a model")
        flags.append(f"--config.distill.teacher={(pretrained or policies)[-1].folder}")
    elif policies:
        flags.append(f"--config.stage.start={policies[-1].folder}")
    if "reward_model" in kind.needs:
        if not judges:
            raise UserError(f"--stages: {stage} needs the stage reward before it")
        flags.append(f"--config.rl.reward_model={judges[-1].folder}")
    return flags


def ensure_tokenizer(planned: Sequence[Planned], folder: Path, progress: Progress) -> None:
    """Trains the tokenizer of all stages on the documents and conversations that they read, unless it exists."""
    if folder.is_dir():
        return
    first = planned[0].config
    pretraining = [each for each in planned if not each.config.stage.kind.needs]
    sources = list(dict.fromkeys(each.config.data.sources for each in pretraining))
    if not sources:
        raise UserError(
            "--stages: the tokenizer is trained on the data of language and code; name at least one of them"
        )
    data = dataclasses.replace(first.data, sources=",".join(sources))
    conversations = [
        chat.render(record.conversation)
        for each in planned
        if each.config.stage.kind.reads == "conversations"
        for record in sft.prepare(each.config, progress).read("train")
    ]
    tokenizer, _ = make_tokenizer(data, first.model.vocab_size, first.tokenizer.train_bytes, progress, conversations)
    with new_folder(folder) as temporary:
        tokenizer.save(temporary)


def run_stage(each: Planned, workdir: Path) -> Done | None:
    """Trains a stage unless the ledger says that it is done. Returns None when a signal interrupted it."""
    ledger = workdir / "stages.json"
    entries = read_json(ledger, "the ledger of stages") if ledger.exists() else {}
    names = [(measure.name, measure.error) for measure in each.measures]
    key = short_key([to_dict(each.config), *_made_from(each.config), names])
    entry = entries.get(each.stage)
    if entry is not None and entry["key"] == key:
        return Done(each.stage, entry["seconds"], {name: Change(*found) for name, found in entry["measures"].items()})
    began = time.monotonic()
    result = run.train(each.config, each.folder)
    if result.interrupted:
        return None
    measures = _measures(each)
    if measures is None:
        return None
    done = Done(each.stage, time.monotonic() - began, measures)
    write_json(ledger, {**entries, each.stage: {"key": key, **dataclasses.asdict(done)}})
    return done


def runs_of(planned: Sequence[Planned]) -> list[Path]:
    """Every run folder that a chain makes, in order."""
    return [folder for each in planned for folder in (each.folder, *_baselines(each))]


def _baselines(each: Planned) -> list[Path]:
    """The run that a stage is compared with: for a student, the same model trained without a teacher."""
    return [each.folder.with_name(f"{each.folder.name}_alone")] if "teacher" in each.config.stage.kind.needs else []


def write_report(workdir: Path, variant: str, done: Sequence[Done]) -> Path:
    """Writes `stages.html` and returns its path."""
    path = workdir / "stages.html"
    rows = [{"stage": stage, "measure": name, **change._asdict()} for stage, name, change in table_rows(done)]
    folders = {each.stage: RunFolder(workdir / each.stage) for each in done}
    write_stages_report(path, variant, {"stages": rows}, folders)
    return path


def table_rows(done: Sequence[Done]) -> list[tuple[str, str, Change]]:
    """The rows of the table: stage, measure, and its change."""
    return [(each.stage, name.replace("_", " "), change) for each in done for name, change in each.measures.items()]


def failures(planned: Sequence[Planned], done: Sequence[Done]) -> list[str]:
    """Descriptions of the measures that did not improve, or are not as good as required."""
    measures = {each.stage: each.measures for each in planned}
    found = [
        (each.stage, fault(measure, each.measures[measure.name])) for each in done for measure in measures[each.stage]
    ]
    return [f"{stage}: {words}" for stage, words in found if words]


def _made_from(config: Config) -> list[Any]:
    """The hashes of the models that a stage starts from or learns from."""
    paths = (config.stage.start, config.distill.teacher, config.rl.reward_model)
    return [loading.origin(Path(path))["hash"] for path in paths if path]


def _measures(each: Planned) -> dict[str, Change] | None:
    """The measures before and after a stage, from the stage's own evaluations; None when a signal came first."""
    config = each.config
    before, after = _logged(each.folder)
    if not all(measure.name in after for measure in each.measures):  # a measure that training does not log
        before, after = [run.evaluate_run(Path(path), config) for path in (config.stage.start, each.folder)]
    for folder in _baselines(each):
        alone = dataclasses.replace(config, distill=dataclasses.replace(config.distill, alpha=1.0))
        if run.train(alone, folder).interrupted:
            return None
        before = _logged(folder)[1]
    return {
        measure.name: Change(before.get(measure.name), after[measure.name], after.get(measure.error))
        for measure in each.measures
    }


def _logged(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The logged evaluation before the first step (empty when there was none) and the best one."""
    _, rows = read_csv(RunFolder(folder).eval_log_csv)
    first = [row for row in rows if row["step"] == 0]
    return first[0] if first else {}, min(rows, key=lambda row: row["loss"])
