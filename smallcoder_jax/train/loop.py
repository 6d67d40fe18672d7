"""The only training loop. A stage hands it a `Task`; it never knows which stage it is.

Nothing in the loop waits for the device but the reading of metrics, and that is one step behind the dispatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smallcoder_jax.config import Config, eval_rows, to_dict
from smallcoder_jax.data.prefetch import BatchIterator, DevicePrefetcher
from smallcoder_jax.errors import UserError
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.mesh import batch_sharding, check_rows, on_mesh, path_name
from smallcoder_jax.models import build
from smallcoder_jax.runtime import give_back_memory
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.checkpoint import Checkpointer
from smallcoder_jax.train.flops import peak_flops
from smallcoder_jax.train.metrics import EvalMetrics, MetricsLog
from smallcoder_jax.train.program import make_program
from smallcoder_jax.train.run_folder import RunFolder, compare_identity, write_training_info
from smallcoder_jax.train.state import TrainState, init_state
from smallcoder_jax.train.step import LossFn, make_eval_step
from smallcoder_jax.train.terminal import Terminal, human_bytes, human_time


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage supplies: a loss and batches, and what is to be said about the data."""

    loss_fn: LossFn
    train_batches: Callable[[], BatchIterator]
    validation_batches: Callable[[int], Iterable[dict[str, np.ndarray]]]  # at most so many; 0: all
    identity: dict[str, Any]  # what a resumed run must agree in
    tokenizer: Tokenizer
    tokenizer_folder: Path
    dataset: str
    dummy_data: bool
    facts: dict[str, str]  # lines of the start table
    references: dict[str, float]  # bits per byte of compressors on the same held-out files


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `interrupted`: SIGTERM or SIGINT came before the last step; the state was saved."""

    step: int
    interrupted: bool
    evaluation: dict[str, float]
    tokens_seen: int


def run_identity(config: Config, task: Task) -> dict[str, Any]:
    """What makes a run this run: its data and their order, the shape, and the arithmetic of its steps."""
    plain = to_dict(config)
    return {
        "data": task.identity,
        "model": plain["model"],
        "optimizer": plain["optimizer"],
        "train": {
            key: plain["train"][key] for key in ("batch_size", "sequence_length", "microbatch_size", "z_loss", "seed")
        },
        "compute": {key: plain["compute"][key] for key in ("dtype", "layers")},
        # A schedule that decays is another schedule when the number of steps differs.
        "steps": config.train.steps if config.optimizer.schedule != "constant" else "any",
    }


class Trainer:
    """One run in one folder: built, resumed if the folder holds a run, trained to `train.steps`.

    Whoever makes one holds `folder.locked()` as long as it is used.
    """

    def __init__(self, config: Config, folder: RunFolder, task: Task, terminal: Terminal):
        self.config, self.folder, self.task, self.terminal = config, folder, task, terminal
        self.started = time.monotonic()
        self.identity = run_identity(config, task)
        if folder.run_json.exists():
            self._refuse_another_run(folder.read_run_json().get("identity"))
        program = make_program(config, task.loss_fn)
        self.mesh, self.train_step = program.mesh, program.step
        self.abstract, self.shardings = program.state, program.shardings
        self.attention, self.cross_entropy = program.attention, program.cross_entropy
        check_rows(self.mesh.shape, eval_rows(config), "eval.batch_size")
        self.checkpointer = Checkpointer(folder.checkpoints, config.checkpoint.keep)
        self.tokens_seen, self.train_seconds, self.best_loss = 0, 0.0, float("inf")
        self.last_loss: float | None = None
        self.evaluation: dict[str, float] = {}
        self.data_state: Any = None
        self.state = self._restore_or_init(program.optimizer)
        self.step = int(self.state.step)
        self.eval_step = make_eval_step(task.loss_fn, mesh=self.mesh, shardings=self.shardings.params)

        def mean_loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            loss_sum, weight_sum, _ = task.loss_fn(params, batch, None)
            return loss_sum / jnp.maximum(weight_sum, 1.0)

        self.gradient = jax.jit(on_mesh(self.mesh, jax.grad(mean_loss)))  # per token, as in the training step
        folder.write_config(config)
        folder.write_run_json(
            self.identity,
            {
                "dataset": task.dataset,
                "dummy_data": task.dummy_data,
                "tokenizer_folder": str(task.tokenizer_folder.resolve()),
                "attention": {"implementation": self.attention.implementation, "reason": self.attention.reason},
                "cross_entropy": self.cross_entropy._asdict(),
            },
        )
        self.log = MetricsLog(
            folder,
            log=config.log,
            run_name=config.name,
            config_dict=to_dict(config),
            resume_step=self.step,
            notify=terminal.note,
        )
        self.log.references(task.references)

    def _refuse_another_run(self, recorded: Any) -> None:
        differences = compare_identity(recorded, self.identity)
        if differences:
            raise UserError(
                f"{self.folder.path} holds another run; choose another --workdir, or undo the difference:\n  "
                + "\n  ".join(differences)
            )

    def _restore_or_init(self, optimizer: Any) -> TrainState:
        steps = self.checkpointer.steps()
        if not steps:
            return jax.jit(lambda: init_state(self.config, optimizer), out_shardings=self.shardings)()
        # Checkpoints may have come here without their run.json, or beside another.
        restored = self.checkpointer.restore(
            steps[-1], self.abstract, check=lambda meta: self._refuse_another_run(meta.get("identity"))
        )
        self.tokens_seen = restored.meta["tokens_seen"]
        self.train_seconds = restored.meta["train_seconds"]
        self.best_loss = restored.meta["best_loss"] if restored.meta["best_loss"] is not None else float("inf")
        self.last_loss = restored.meta["last_loss"]
        self.evaluation = restored.meta["evaluation"]
        self.data_state = restored.data_state
        self.terminal.note(f"resuming at step {steps[-1]} of {self.folder.path}")
        return restored.state

    def run(self) -> Outcome:
        """Trains until `train.steps`, or until SIGTERM or SIGINT, and saves. Raises what the data or a save raised."""
        stop = StopRequest()
        with contextlib.closing(self.log), stop:
            try:
                if self.step < self.config.train.steps:
                    self._train(stop)
            finally:
                self.checkpointer.wait()  # a signal must not kill the last save, nor the folder be free before its end
        self._write_info()
        interrupted = stop.requested and self.step < self.config.train.steps
        return Outcome(self.step, interrupted, self.evaluation, self.tokens_seen)

    def _train(self, stop: StopRequest) -> None:
        batches = self.task.train_batches()
        if self.data_state is not None:
            batches.set_state(self.data_state)
        prefetcher = DevicePrefetcher(batches, batch_sharding(self.mesh), self.config.data.prefetch)
        try:
            batch, data_state, waited = next(prefetcher)
            compile_start = time.monotonic()
            compiled = self.train_step.lower(self.state, batch).compile()
            give_back_memory()
            self._show_start(compiled, time.monotonic() - compile_start)
            meter = Meter(self.config, self.mesh)
            pending: tuple[int, Any, float] | None = None
            with jax.transfer_guard("disallow"):
                while True:
                    self.state, metrics = compiled(self.state, batch)
                    self.step += 1
                    self.data_state = data_state
                    if pending is not None:
                        self._report(meter, *pending)
                    pending = (self.step, metrics, waited)
                    last = self.step >= self.config.train.steps or stop.requested
                    if last or self._is_due():
                        self._report(meter, *pending)
                        pending = None
                        meter.pause()
                        self._between_steps(last)
                        meter.resume()
                    if last:
                        return
                    batch, data_state, waited = next(prefetcher)
        finally:
            prefetcher.close()

    def _is_due(self) -> bool:
        config = self.config
        every = (config.eval.every, config.checkpoint.every, config.log.charts_every, config.log.histograms_every)
        return any(period and self.step % period == 0 for period in every)

    def _between_steps(self, last: bool) -> None:
        """Evaluation, samples, saving, histograms and charts: whatever is due after this step."""
        config, step = self.config, self.step
        finished = step >= config.train.steps
        best = False
        with jax.transfer_guard("allow"):
            if finished or (config.eval.every and step % config.eval.every == 0):
                best = self._evaluate()
            if best or last or step % config.checkpoint.every == 0:
                self._save(best)
            if config.log.histograms_every and step % config.log.histograms_every == 0:
                self._histograms()
        if last or (config.log.charts_every and step % config.log.charts_every == 0):
            self.log.charts(step)

    def _report(self, meter: Meter, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Reads the metrics of a step that was dispatched before the newest one."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens = int(values.pop("tokens"))
        self.tokens_seen += tokens
        rates = meter.step(tokens, waited)
        self.train_seconds += rates["step_time"]
        self.last_loss = values["loss"]
        if step % self.config.train.log_every == 0 or step == 1 or step == self.config.train.steps:
            self.log.train(step, {**values, **meter.interval(), "tokens_seen": self.tokens_seen})
        self.terminal.progress(step, {**values, **rates})
        self.checkpointer.check()

    def _evaluate(self) -> bool:
        """Evaluates, logs, writes samples. Returns whether this is the best loss so far."""
        total = evaluate(
            self.eval_step,
            self.state.params,
            self.task.validation_batches(self.config.eval.batches),
            batch_sharding(self.mesh),
        ).compute()
        self.evaluation = total
        self.log.evaluation(self.step, total)
        best = total["loss"] < self.best_loss
        self.best_loss = min(self.best_loss, total["loss"])
        self.terminal.note(
            f"step {self.step}: validation loss {total['loss']:.4f}, {total['bits_per_byte']:.4f} bits per byte, "
            f"accuracy {total['accuracy']:.1%}{' (best so far)' if best else ''}"
        )
        if self.config.eval.sample_tokens and self.config.eval.sample_prompts:
            self._samples(total["accuracy"])
        return best

    def _samples(self, accuracy: float) -> None:
        config = self.config
        params = build.to_unrolled(self.state.params)
        generator = Generator(config.model, config.compute, params, self.task.tokenizer)
        options = SamplingOptions(
            max_tokens=config.eval.sample_tokens,
            temperature=config.eval.sample_temperature,
            seed=config.train.seed,
            truncate_prompt=True,
        )
        completions = generator.generate(list(config.eval.sample_prompts), options)
        samples = [
            {"step": self.step, "input": prompt, "output": completion.text, "accuracy": accuracy}
            for prompt, completion in zip(config.eval.sample_prompts, completions, strict=True)
        ]
        self.log.samples(self.step, samples)

    def _save(self, best: bool) -> None:
        meta = {
            "config": to_dict(self.config),
            "identity": self.identity,
            "tokenizer_hash": self.task.tokenizer.hash,
            "fingerprint": self.task.identity.get("fingerprint"),
            "dummy_data": self.task.dummy_data,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "last_loss": self.last_loss,
            "best_loss": self.best_loss if np.isfinite(self.best_loss) else None,
            "evaluation": self.evaluation,
        }
        self.log.flush()  # a run that continues from this step has its lines
        self.checkpointer.save(self.state, meta, self.data_state, best=best)

    def _histograms(self) -> None:
        """Weights, and gradients on the first rows of the validation split, as histograms by path."""
        rows = next(iter(self.task.validation_batches(1)))
        batch = jax.device_put(rows, batch_sharding(self.mesh))
        gradients = self.gradient(self.state.params, batch)
        named = [
            {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (self.state.params, gradients)
        ]
        self.log.histograms(self.step, *named)

    def _show_start(self, compiled: Any, compile_seconds: float) -> None:
        config, mesh = self.config, self.mesh
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        memory = compiled.memory_analysis()
        choice, chunk = self.attention, self.cross_entropy.chunk
        device = mesh.devices.flat[0]
        self.terminal.start_table(
            f"{config.name}: {config.train.steps} steps of {config.train.batch_size} x {config.train.sequence_length} "
            f"tokens, from step {self.step}",
            {
                "model": {
                    "parameters": f"{count:,}",
                    "shape": f"width {config.model.width}, layers {config.model.layers}, heads {config.model.heads}:"
                    f"{config.model.kv_heads} x {config.model.head_size}, MLP {config.model.mlp_width}, "
                    f"vocabulary {config.model.vocab_size}",
                    "compute": f"{config.compute.dtype}, layers {config.compute.layers}, remat {config.compute.remat}",
                    "attention": f"{choice.implementation} ({choice.reason})",
                    "cross-entropy": f"{'all tokens at once' if chunk is None else f'{chunk} tokens at a time'} "
                    f"({self.cross_entropy.reason})",
                },
                "memory": {
                    "state": human_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / mesh.devices.size),
                    "step": f"{human_bytes(memory.temp_size_in_bytes)} of temporaries per device",
                }
                if memory is not None
                else {},
                "mesh": {
                    "devices": f"{mesh.devices.size} x {device.device_kind}",
                    "axes": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
                },
                "data": self.task.facts,
                "start": {
                    "compiled in": human_time(compile_seconds),
                    "first step after": human_time(time.monotonic() - self.started),
                },
            },
        )

    def _write_info(self) -> None:
        write_training_info(
            self.folder,
            variant_name=self.config.name,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            dataset=self.task.dataset,
            config=self.config,
            steps=self.step,
            tokens_seen=self.tokens_seen,
            train_seconds=self.train_seconds,
            final_train_loss=self.last_loss,
            best_val_loss=self.best_loss if np.isfinite(self.best_loss) else None,
            best_step=self.checkpointer.best(),
            dummy_data=self.task.dummy_data,
            started_from=None,
        )


def evaluate(eval_step: Any, params: Any, batches: Iterable[dict[str, np.ndarray]], sharding: Any) -> EvalMetrics:
    """The sums of an evaluation over `batches` (numpy, this process's rows)."""
    total = EvalMetrics.empty()
    pending = None
    for batch in batches:
        placed = {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
        sums = eval_step(params, placed)
        if pending is not None:
            total = total.merge(EvalMetrics.from_model_output(**jax.device_get(pending)))
        pending = sums
    if pending is None:
        raise UserError("there is nothing to evaluate on: the validation split is empty")
    return total.merge(EvalMetrics.from_model_output(**jax.device_get(pending)))


class Meter:
    """Wall time per step, without evaluations and saves in between."""

    def __init__(self, config: Config, mesh: Mesh):
        self.flops = build.flops_per_token(config.model, config.train.sequence_length)
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = None if peak is None else peak * mesh.devices.size
        self.last = time.monotonic()
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0

    def pause(self) -> None:
        self.paused = time.monotonic()

    def resume(self) -> None:
        self.last += time.monotonic() - self.paused

    def step(self, tokens: int, waited: float) -> dict[str, float]:
        """Rates of one step that has just finished."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.waited, self.steps = self.waited + waited, self.steps + 1
        return self._rates(tokens, seconds, waited, 1)

    def interval(self) -> dict[str, float]:
        """Rates since the last call."""
        rates = self._rates(self.tokens, self.seconds, self.waited, self.steps)
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0
        return rates

    def _rates(self, tokens: int, seconds: float, waited: float, steps: int) -> dict[str, float]:
        """`mfu` only where the device's peak is known."""
        rate = tokens / max(seconds, 1e-9)
        rates = {"tokens_per_second": rate, "data_wait": waited / steps, "step_time": seconds / steps}
        return rates if self.peak is None else {**rates, "mfu": rate * self.flops / self.peak}


class StopRequest:
    """Turns SIGTERM or SIGINT into a request that the loop sees between steps; a second SIGINT is immediate."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
