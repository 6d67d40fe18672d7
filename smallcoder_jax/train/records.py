"""The records that a run keeps about itself: its identity, its start, its skipped updates and its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.distributed import is_first
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import write_json
from smallcoder_jax.base.terminal import Terminal, human_time
from smallcoder_jax.config import Config, to_dict
from smallcoder_jax.report.log import MetricsLog, SilentLog
from smallcoder_jax.report.run_folder import (
    RunFolder,
    check_allowed,
    compare_identity,
    split_allowed,
    write_training_info,
)
from smallcoder_jax.train.history import History
from smallcoder_jax.train.program import Program
from smallcoder_jax.train.start_table import start_sections
from smallcoder_jax.train.state import TrainState
from smallcoder_jax.train.task import Task, run_identity
from smallcoder_jax.train.whereabouts import keep_tokenizer


class Records:
    """The records of one run in its folder. Raises UserError when the folder holds another run."""

    def __init__(
        self, config: Config, folder: RunFolder, task: Task, terminal: Terminal, allow_changed: tuple[str, ...]
    ):
        self._config, self._folder, self._task, self._terminal = config, folder, task, terminal
        self._allow_changed = allow_changed
        self.identity = run_identity(config, task)
        check_allowed(allow_changed, self.identity)
        if folder.run_json.exists():
            self.refuse_another_run(folder.read_run_json().get("identity"))

    def refuse_another_run(self, recorded: Any) -> None:
        """Raises UserError when the `recorded` identity is not this run's. Differences that are allowed are noted."""
        refused, allowed = split_allowed(compare_identity(recorded, self.identity), self._allow_changed)
        if refused:
            raise UserError(
                f"{self._folder.path} holds another run; choose another --workdir, undo the difference, or name what "
                "may differ from now on in --allow-changed:\n  " + "\n  ".join(refused)
            )
        for line in allowed:
            self._terminal.note(f"allowed to differ: {line}")

    def open_log(self, program: Program, step: int, evaluated_step: int) -> MetricsLog | SilentLog:
        """Writes the config and the identity, and opens the logs for continuing after `step`. Only process 0 writes."""
        if not is_first():
            return SilentLog()
        config, folder, task = self._config, self._folder, self._task
        folder.write_config(config)
        keep_tokenizer(folder, task.tokenizer)
        if task.manifest is not None:
            write_json(folder.tokens_json, dataclasses.asdict(task.manifest))
        folder.write_run_json(
            self.identity,
            {
                "dataset": task.dataset,
                "dummy_data": task.dummy_data,
                "started_from": self._started_from(),
                "data_folder": folder.relative(Path(config.data.dir).expanduser()),
                "attention": {"implementation": program.attention.implementation, "reason": program.attention.reason},
                "recurrence": [each._asdict() for each in program.recurrence],
                "cross_entropy": program.cross_entropy._asdict(),
                "matmul": program.matmul._asdict(),
            },
        )
        log = MetricsLog(
            folder,
            log=config.log,
            run_name=config.name,
            config_dict=to_dict(config),
            resume_step=step,
            evaluated_step=evaluated_step,
            notify=self._terminal.note,
        )
        log.references(task.references)
        return log

    def show_start(
        self, program: Program, state: TrainState, frozen: Any, memory: Any, compiled_in: float, first_step: float
    ) -> None:
        """Shows the table at the start, and warnings. `memory` is XLA's analysis of the step; times are in seconds."""
        config, task = self._config, self._task
        title = (
            f"{config.name}: {config.train.steps} steps of {config.train.batch_size} x "
            f"{config.train.sequence_length} tokens, from step {int(state.step)}"
        )
        times = {"compiled in": human_time(compiled_in), "first step after": human_time(first_step)}
        sections = start_sections(config, program, state, frozen, memory)
        self._terminal.start_table(title, {**sections, "data": task.facts, "start": times})
        for warning in filter(None, (config.optimizer.schedule_fault(config.train.steps), *task.warnings)):
            self._terminal.note(f"warning: {warning}")

    def keep_skipped(
        self, step: int, reason: str, values: dict[str, float], batch: dict[str, jax.Array], data_state: Any
    ) -> Path:
        """Saves the batch of a skipped update and returns its file. `values` contains loss and grad_norm."""
        loss, norm = values["loss"], values["grad_norm"]
        with jax.transfer_guard("allow"):
            path = self._folder.write_skipped(
                step,
                {"reason": reason, "loss": loss, "grad_norm": norm, "data_state": data_state},
                {name: local_rows(array) for name, array in batch.items()},
            )
        self._terminal.note(f"step {step}: update skipped, {reason}: loss {loss:.4g}, norm {norm:.4g}; batch in {path}")
        return path

    def meta(self, history: History) -> dict[str, Any]:
        """The description of the run that is stored in a checkpoint."""
        return {
            "config": to_dict(self._config),
            "identity": self.identity,
            "tokenizer_hash": self._task.tokenizer.hash,
            "fingerprint": self._task.identity.get("fingerprint"),
            "dummy_data": self._task.dummy_data,
            **history.to_meta(),
        }

    def write_info(self, history: History, state: TrainState, frozen: Any, best_step: int | None) -> None:
        """Writes the summary at the end, `training_info.json`."""
        trained = (state.params, frozen.get("model", {}))
        write_training_info(
            self._folder,
            variant_name=self._config.name,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(trained)),
            dataset=self._task.dataset,
            config=self._config,
            steps=int(state.step),
            tokens_seen=history.tokens_seen,
            train_seconds=history.train_seconds,
            final_train_loss=history.last_loss,
            best_val_loss=history.best_evaluated,
            best_step=best_step,
            skipped_updates=int(state.guard.skipped),
            dummy_data=self._task.dummy_data,
            started_from=started["path"] if (started := self._started_from()) else None,
        )

    def _started_from(self) -> dict[str, Any] | None:
        """The facts of the start model, with its path relative to the run folder."""
        start = self._task.start
        return None if start is None else {**start.facts, "path": self._folder.relative(Path(start.facts["path"]))}


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch that this process holds."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards if shard.replica_id == 0])
