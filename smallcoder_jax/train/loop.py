"""The only training loop. A stage gives it a `Task`, and the loop does not know which stage it is.

Only reading metrics waits for the device, and metrics are read one step after they were dispatched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from smallcoder_jax.base.distributed import StopVote, is_first
from smallcoder_jax.base.errors import Diverged, NotFinite
from smallcoder_jax.base.faults import NONE, Faults, poisoned
from smallcoder_jax.base.runtime import give_back_memory
from smallcoder_jax.base.terminal import Terminal
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data.rows.prefetch import DevicePrefetcher
from smallcoder_jax.data.tokens.verification import steps_until_repeated
from smallcoder_jax.mesh import batch_sharding, check_rows, process_rows
from smallcoder_jax.models import build
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.train.checkpoint import Checkpointer
from smallcoder_jax.train.evaluation import Evaluator, draw_samples, find_boundaries, whole_leaves
from smallcoder_jax.train.meter import Meter
from smallcoder_jax.train.profile import StepProfile
from smallcoder_jax.train.program import make_program
from smallcoder_jax.train.records import Records
from smallcoder_jax.train.start import find_start
from smallcoder_jax.train.stop import StopRequest
from smallcoder_jax.train.task import Task
from smallcoder_jax.train.watchdog import Watchdog

_AT_STEP = "the current step or batch of an evaluation"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted` means that SIGTERM or SIGINT came before the last step; the state was saved."""

    step: int
    interrupted: bool
    evaluation: dict[str, float]
    tokens_seen: int


class Dispatched(NamedTuple):
    """A dispatched step: its future metrics, and its batch, which is kept in case the update is skipped."""

    step: int
    metrics: dict[str, jax.Array]
    waited: float
    batch: dict[str, jax.Array]
    data_state: Any  # of the iterator before it returned this batch


class Trainer:
    """Trains one run in one folder up to `train.steps`. Resumes if the folder holds a run.

    The caller must hold `folder.locked()` as long as the trainer is used.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        task: Task,
        terminal: Terminal,
        *,
        faults: Faults = NONE,
        allow_changed: tuple[str, ...] = (),
    ):
        self.config, self.folder, self.task, self.terminal = config, folder, task, terminal
        self.faults = faults
        self.watchdog = Watchdog(folder.path)
        self.started = time.monotonic()
        self.records = Records(config, folder, task, terminal, allow_changed)
        self.program = program = make_program(
            config, task.loss_fn, reported=task.reported, frozen=task.frozen, frozen_model=task.frozen_model
        )
        self.mesh, self.train_step = program.mesh, program.step
        self.frozen = jax.device_put(task.frozen, program.frozen_shardings)
        check_rows(self.mesh.shape, eval_rows(config), "eval.batch_size")
        self.checkpointer = Checkpointer(folder.checkpoints, config.checkpoint.keep, faults)
        start = find_start(config, task, program, self.checkpointer, self.records, terminal)
        self.state, self.history = start.state, start.history
        self.data_state, self.saved_step = start.data_state, start.saved_step
        self.owes_save = False  # a save was due while updates were being skipped
        self.at_work = _AT_STEP  # what it is doing, for the message on a signal
        self.step = int(self.state.step)
        self.skipped_in_a_row = int(self.state.guard.skipped_in_a_row)
        self.verified_at = self.step  # the step at which the data must have been verified
        if task.manifest is not None:
            tokens = config.train.batch_size * config.train.sequence_length
            self.verified_at += steps_until_repeated(task.manifest, config.data, tokens)
        self.vote = StopVote(self.mesh)
        self.evaluator = Evaluator(config, task, program, self.frozen, self.watchdog, self.vote)
        self.log = self.records.open_log(program, self.step, self.step - self.history.owes_evaluation)

    def run(self) -> Outcome:
        """Trains until `train.steps`, or until SIGTERM or SIGINT, and saves. Raises errors of the data or of a save."""
        began, owed = self.step, self.history.owes_evaluation
        stop = StopRequest(self._hear)
        with contextlib.closing(self.log), self.watchdog, stop:
            try:
                if self.history.owes_evaluation and self._evaluate(stop):
                    self._save(True, self.config.checkpoint.keep)
                if self.step < self.config.train.steps and not self.vote.passed:
                    self._train(stop)
            finally:
                # A signal must not kill the last save, and the folder stays locked until it has finished.
                with self.watchdog.wait("a checkpoint (guard.save_seconds)", self.config.guard.save_seconds):
                    self.checkpointer.wait()
        # A run that was already finished has nothing new to write.
        if is_first() and (self.step > began or owed or not self.folder.training_info_json.exists()):
            self._write_info()
        interrupted = self.vote.passed and (self.step < self.config.train.steps or self.history.owes_evaluation)
        return Outcome(self.step, interrupted, self.history.evaluation, self.history.tokens_seen)

    def _hear(self) -> None:
        """Called by the signal handler at once. The rest of stopping waits for the end of a step."""
        self.watchdog.limit("the end, after a signal (guard.stop_seconds)", self.config.guard.stop_seconds)
        since = "nothing is saved" if self.saved_step is None else f"what came after step {self.saved_step} is lost"
        self.terminal.at_once(
            f"asked to stop: the run is saved and ends after {self.at_work}. Ctrl-C now ends it at once: {since}"
        )

    def _train(self, stop: StopRequest) -> None:
        batches = self.task.train_batches(process_rows(self.mesh, self.config.train.batch_size))
        if self.data_state is not None:
            batches.set_state(self.data_state)
        depth, guard = 0 if self.task.on_params else self.config.data.prefetch, self.config.guard
        prefetcher = DevicePrefetcher(batches, batch_sharding(self.mesh), depth, self.faults)
        timed_batches = self.watchdog.each("a batch (guard.data_seconds)", guard.data_seconds, prefetcher)
        profile = StepProfile(self.config.log, self.folder.profile)
        try:
            batch, data_state, waited = self._next_batch(timed_batches)
            self.faults.reach("compile")
            compile_start = time.monotonic()
            self.at_work = "compiling the step, which can take minutes, and running it once"
            compiled = self.train_step.lower(self.state, batch, self.frozen).compile()
            give_back_memory()
            self.at_work = _AT_STEP
            seconds = [time.monotonic() - begun for begun in (compile_start, self.started)]
            self.records.show_start(self.program, self.state, self.frozen, compiled.memory_analysis(), *seconds)
            meter = Meter(self.config, self.mesh)
            pending: Dispatched | None = None
            with jax.transfer_guard("disallow"):
                while True:
                    if "nan" in self.faults.reach("step", self.step + 1):
                        batch = poisoned(batch)
                    with profile.step(self.step + 1):
                        self.state, metrics = compiled(self.state, batch, self.frozen)
                    self.step += 1
                    if profile.after(self.step, metrics):
                        self.terminal.note(f"step {self.step}: a trace is in {self.folder.profile} (BUILD.md)")
                    before, self.data_state = self.data_state, data_state
                    if pending is not None:
                        self._report(meter, pending)
                    metrics = {**metrics, **self.vote.cast(stop.requested)}
                    pending = Dispatched(self.step, metrics, waited, batch, before)
                    if self.step >= self.config.train.steps or self.vote.passed or self._is_due():
                        self._report(meter, pending)
                        pending = None
                        meter.pause()
                        if self._between_steps(stop):
                            return
                        meter.resume()
                    batch, data_state, waited = self._next_batch(timed_batches)
        finally:
            profile.close()
            prefetcher.close()

    @property
    def params(self) -> build.Params:
        """The current values of all parts that the loss sees."""
        return {**self.frozen, **self.state.params}

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        if self.task.on_params is not None:
            self.task.on_params(self.params)
        return next(batches)

    def _is_due(self) -> bool:
        config = self.config
        if self.owes_save:
            return True
        every = (config.eval.every, config.checkpoint.every, config.log.charts_every, config.log.histograms_every)
        return any(period and self.step % period == 0 for period in every)

    def _between_steps(self, stop: StopRequest) -> bool:
        """Runs whatever is due after this step: evaluation, samples, saving, histograms and charts.

        Returns whether the run ends here. If it ends because of a signal, an evaluation that is due waits until the run
        is continued.
        """
        config, step = self.config, self.step
        finished = step >= config.train.steps
        with jax.transfer_guard("allow"):
            best = None
            if finished or (config.eval.every and step % config.eval.every == 0):
                best = self._evaluate(stop)
            last = finished or self.vote.passed
            if best or last or self.owes_save or step % config.checkpoint.every == 0:
                self._save_sound(best, last)
            if config.log.histograms_every and step % config.log.histograms_every == 0:
                self._histograms()
        if last or (config.log.charts_every and step % config.log.charts_every == 0):
            self.log.charts(step)
        return last

    def _save_sound(self, best: bool | None, last: bool) -> None:
        """Saves, unless the parameters may be bad: while updates are being skipped, or when the evaluation was not
        finite, a save would displace good checkpoints.

        A save that was due while updates are skipped is done after the next applied update. If the run ends first, it
        is saved without removing older steps. `best` is the result of `_evaluate` at this step. Raises Diverged when
        the run would end with a model that is not finite.
        """
        keep = self.config.checkpoint.keep
        if best or (self.history.is_finite and not self.skipped_in_a_row):
            self.owes_save = False
            # A step that was not evaluated must not be the only one kept: only the next step shows if it is finite.
            self._save(bool(best), max(keep, 2) if best is None else keep)
        elif last and (self.history.is_finite or self.vote.passed):
            self._save(False, 0)
        elif last:
            self.log.flush()
            raise Diverged(
                f"the validation loss of step {self.step}, the last one, is not finite: this step is not saved. "
                f"{self._sound_steps()} Lower optimizer.learning_rate, or start again from sound data"
            )
        elif not self.owes_save:
            self.owes_save = bool(self.skipped_in_a_row)
            cause = "updates are being skipped" if self.skipped_in_a_row else "the validation loss is not finite"
            self.terminal.note(f"step {self.step} is not saved: {cause}")

    def _sound_steps(self) -> str:
        self.checkpointer.wait()
        steps = self.checkpointer.steps()
        return f"The newest sound checkpoint is step {steps[-1]}." if steps else "There is no checkpoint yet."

    def _report(self, meter: Meter, dispatched: Dispatched) -> None:
        """Reads and logs the metrics of a dispatched step. Raises Diverged after too many skipped updates."""
        step, guard = dispatched.step, self.config.guard
        with self.watchdog.wait(f"the result of step {step} (guard.step_seconds)", guard.step_seconds):
            values = {name: float(value) for name, value in jax.device_get(dispatched.metrics).items()}
        self.vote.count(values)
        # The weights of a bad batch may themselves be not finite.
        tokens, in_a_row = int(np.nan_to_num(values.pop("tokens"), posinf=0)), int(values.pop("skipped_in_a_row"))
        self.skipped_in_a_row = in_a_row
        if values.pop("skipped"):
            self._skipped(dispatched, values, in_a_row)
        self.history.tokens_seen += tokens
        rates = meter.step(tokens, dispatched.waited)
        self.history.train_seconds += rates["step_time"]
        self.history.last_loss = values["loss"]
        if step % self.config.train.log_every == 0 or step == 1 or step == self.config.train.steps:
            self.log.train(step, {**values, **meter.interval(), "tokens_seen": self.history.tokens_seen})
        self.terminal.progress(step, {**values, **rates})
        self.checkpointer.check()
        self._check_data()

    def _check_data(self) -> None:
        """Raises UserError when a data file differs from the prepared one. Waits for the verification to finish before
        a document can be repeated, and before the run ends.
        """
        verification = self.task.verification
        if verification is None:
            return
        if self.step >= min(self.verified_at, self.config.train.steps):
            if not verification.done:
                self.terminal.note("waiting until the checksum of every file of token shards is verified")
            verification.wait()
        verification.check()

    def _skipped(self, dispatched: Dispatched, values: dict[str, float], in_a_row: int) -> None:
        """Records a skipped update and its batch. Raises Diverged after too many in a row."""
        step = dispatched.step
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        reason = "the loss is a spike" if finite else "loss or gradient is not finite"
        path = self.records.keep_skipped(step, reason, values, dispatched.batch, dispatched.data_state)
        if in_a_row >= self.config.guard.max_skipped:
            self.log.flush()
            raise Diverged(
                f"{in_a_row} updates in a row were skipped (guard.max_skipped), the last at step {step}: {reason}. The "
                f"batches are in {path.parent}. {self._sound_steps()} Look at them, lower "
                "optimizer.learning_rate, or raise guard.spike_sigma if you do not consider them spikes"
            )

    def _evaluate(self, stop: StopRequest) -> bool | None:
        """Evaluates, logs, writes samples. Returns whether the loss is the best so far; None if a signal came first."""
        self.history.owes_evaluation = True
        if self.vote.passed:
            return None
        self.faults.reach("evaluation")
        total = self.evaluator.evaluate(self.task, self.state.params, stop)
        if total is None:
            return None
        samples = self._sample(total)
        best = self.history.add_evaluation(total)
        self.log.evaluation(self.step, total)
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in total.items())
        self.terminal.note(f"step {self.step}, validation: {values}{' (best so far)' if best else ''}")
        self.log.samples(self.step, samples)
        if samples:
            self.terminal.sample(samples[0]["input"], samples[0]["output"])
        if (found := find_boundaries(self.config, self.task, self.params)) is not None:
            self.log.boundaries(self.step, found)
        return best

    def _sample(self, total: dict[str, float]) -> list[dict[str, Any]]:
        """Samples of text for an evaluation, to which the measures of these texts are added."""
        if not self.config.eval.sample_tokens:
            return []
        try:
            samples, measures = draw_samples(self.config, self.task, self.params, total.get("accuracy"))
        except NotFinite as error:  # only the guard may end the run
            self.terminal.note(f"no samples: {error}")
            return []
        total |= measures
        return samples

    def _save(self, best: bool, keep: int) -> None:
        self.log.flush()  # so that a run that continues from this step has its log lines
        with self.watchdog.wait("a checkpoint (guard.save_seconds)", self.config.guard.save_seconds):
            self.checkpointer.save(self.state, self.records.meta(self.history), self.data_state, best=best, keep=keep)
        self.saved_step = self.step

    def _histograms(self) -> None:
        """Logs histograms of weights and, if the task has validation batches, of gradients on the first batch."""
        rows = next(iter(self.task.validation_batches(1, self.evaluator.rows)), None)
        gradients = {} if rows is None else self.evaluator.gradient(self.state.params, rows)
        self.log.histograms(self.step, whole_leaves(self.state.params), whole_leaves(gradients))

    def _write_info(self) -> None:
        self.records.write_info(self.history, self.state, self.frozen, self.checkpointer.best())
