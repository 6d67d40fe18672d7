"""Evaluates a model during training: the loss on held-out batches, samples of its text, and gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smallcoder_jax.base.distributed import StopVote
from smallcoder_jax.config import ComputeConfig, Config, ModelConfig, eval_rows
from smallcoder_jax.generate.engine import Completion, Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.utf8 import utf8_measures
from smallcoder_jax.mesh import batch_sharding, on_mesh, parameter_name, place_batch, process_rows
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.ops import precision
from smallcoder_jax.report.boundaries import Boundaries
from smallcoder_jax.train.program import Program
from smallcoder_jax.train.step import LossFn, make_eval_step
from smallcoder_jax.train.stop import StopRequest
from smallcoder_jax.train.sums import add_up
from smallcoder_jax.train.task import Evaluation, Task
from smallcoder_jax.train.watchdog import Watchdog

_SHOWN_TOKENS = 384  # of a held-out document, of which a picture is drawn
_INPUTS = ("tokens", "positions", "segment_ids")


class Evaluator:
    """Evaluates a task on its training mesh. `frozen` holds the parts that are not trained, on that mesh."""

    def __init__(self, config: Config, task: Task, program: Program, frozen: Any, watchdog: Watchdog, vote: StopVote):
        self._config, self._frozen, self._watchdog, self._vote = config, frozen, watchdog, vote
        self._sharding = batch_sharding(program.mesh)
        self._step = make_eval_step(
            task.loss_fn,
            matmul=program.matmul.kind,
            mesh=program.mesh,
            shardings=program.shardings.params,
            frozen_shardings=program.frozen_shardings,
        )
        self._gradient = make_gradient(task.loss_fn, program.matmul.kind, program.mesh)
        self.rows = process_rows(program.mesh, eval_rows(config))  # this process's rows of each global batch

    def evaluate(self, task: Task, params: build.Params, stop: StopRequest) -> dict[str, float] | None:
        """`Task.evaluate` for the trained parameters `params`; None when a signal comes before the end."""
        what, seconds = "a validation batch (guard.data_seconds)", self._config.guard.data_seconds
        return task.evaluate(
            Evaluation(
                params={**self._frozen, **params},
                score=lambda batch: self._step(params, place_batch(self._sharding, batch), self._frozen),
                add=lambda batches: add_up(batches, self._vote, lambda: stop.requested),
                drawn=lambda items: self._watchdog.each(what, seconds, items),
                rows=self.rows,
                limit=self._config.eval.batches,
            )
        )

    def gradient(self, params: build.Params, batch: Mapping[str, np.ndarray]) -> Any:
        """The gradient of the loss per token, as in the training step."""
        return self._gradient(params, place_batch(self._sharding, batch), self._frozen)


def on_this_device(
    compute: ComputeConfig, loss_fn: LossFn, params: build.Params, *, rows: int, limit: int
) -> Evaluation:
    """An evaluation on JAX's default device, without a mesh, of at most `limit` batches (0: all) of `rows` rows.

    `params` are all parts that the loss sees.
    """

    def sums_of(params: build.Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, weight, sums = loss_fn(params, batch, None)
        return {**sums, "weight": weight}

    matmul = precision.choose(compute, jax.default_backend())
    compiled = jax.jit(precision.multiplying(matmul.kind, sums_of))
    return Evaluation(params, lambda batch: compiled(params, dict(batch)), add_up, iter, range(rows), limit)


def draw_samples(
    config: Config, task: Task, params: build.Params, accuracy: float | None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Samples completions of the task's prompts or, if it has none, of `eval.sample_prompts`.

    Returns the samples, each {input, output, accuracy}, and the `utf8_measures` of all. `params` are all parts that the
    loss sees. Raises NotFinite if logits are not.
    """
    prompts = task.prompts
    if prompts is None:
        prompts = {prompt: prompt for prompt in config.eval.sample_prompts}
    model = build.to_unrolled(build.model_params(params))
    generator = Generator(config.model, config.compute, model, task.tokenizer)
    completions = complete(config, generator, list(prompts.values()))
    samples = [
        {"input": prompt, "output": completion.text, "accuracy": accuracy}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return samples, utf8_measures(completions, task.tokenizer)


def complete(config: Config, generator: Generator, prompts: Sequence[str | Sequence[int]]) -> list[Completion]:
    """Completions of `prompts` by the settings of `eval`. Raises NotFinite if logits are not."""
    options = SamplingOptions(
        max_tokens=config.eval.sample_tokens,
        temperature=config.eval.sample_temperature,
        seed=config.train.seed,
        truncate_prompt=True,
    )
    return generator.generate(prompts, options)


def find_boundaries(config: Config, task: Task, params: build.Params) -> Boundaries | None:
    """Where the model's chunks begin in the first held-out document, or in its first `_SHOWN_TOKENS` tokens.

    None if the model makes no chunks, or the task has no held-out batches. `params` are all parts that the loss sees.
    """
    if family_of(config.model).boundaries is None:
        return None
    # The same row on all processes.
    batch = next(iter(task.validation_batches(1, range(1))), None)
    if batch is None:
        return None
    row = {name: batch[name].reshape(-1, batch[name].shape[-1])[:1, :_SHOWN_TOKENS] for name in _INPUTS}
    shown = row["segment_ids"] == row["segment_ids"][0, 0]
    row["segment_ids"] = shown.astype(np.int32)
    model = build.to_unrolled(build.model_params(params))
    compute = dataclasses.replace(config.compute, layers="unroll", remat="none")
    stages = _boundaries(config.model, compute, model, *(row[name] for name in _INPUTS))
    stages = multihost_utils.process_allgather(stages, tiled=True)
    ids = row["tokens"][shown].tolist()
    found = [(begins_BT[shown], probability_BT[shown]) for begins_BT, probability_BT in stages]
    return Boundaries([task.tokenizer.token_bytes[i] for i in ids], found) if found else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _boundaries(model: ModelConfig, compute: ComputeConfig, params: build.Params, *inputs: jax.Array) -> Any:
    graph, _ = build.abstract_model(model, compute)
    of_family = family_of(model).boundaries
    assert of_family is not None
    return of_family(build.bind(graph, params), *inputs)


def make_gradient(loss_fn: LossFn, matmul: precision.Kind, mesh: Mesh) -> Any:
    """A jitted function (parameters, batch, frozen parameters) -> gradient of the loss per token, as in training."""

    def mean_loss(params: Any, batch: dict[str, jax.Array], frozen: Any) -> jax.Array:
        loss_sum, weight_sum, _ = loss_fn({**frozen, **params}, batch, None)
        return loss_sum / jnp.maximum(weight_sum, 1.0)

    return jax.jit(on_mesh(mesh, precision.multiplying(matmul, jax.grad(mean_loss))))


def whole_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every parameter as a whole array by its name, gathered from all processes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameter_name(path): multihost_utils.process_allgather(leaf, tiled=True) for path, leaf in leaves}
