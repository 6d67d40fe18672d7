"""Evaluation of a model: the loss on held-out batches, what it writes, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smallcoder_jax.base.distributed import StopVote
from smallcoder_jax.config import ComputeConfig, Config, eval_rows
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.mesh import batch_sharding, on_mesh, parameter_name, place_batch, process_rows
from smallcoder_jax.models import build
from smallcoder_jax.ops import precision
from smallcoder_jax.train.program import Program
from smallcoder_jax.train.step import LossFn, make_eval_step
from smallcoder_jax.train.stop import StopRequest
from smallcoder_jax.train.sums import add_up
from smallcoder_jax.train.task import Evaluation, Task
from smallcoder_jax.train.watchdog import Watchdog


class Evaluator:
    """Evaluates a task on the mesh of its training. `frozen`: the parts that are not trained, on that mesh."""

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
        self.rows = process_rows(program.mesh, eval_rows(config))  # of each global batch, those of this process

    def evaluate(self, task: Task, params: build.Params, stop: StopRequest) -> dict[str, float] | None:
        """`Task.evaluate` of the parameters that are trained; None where a signal comes before the end."""
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
        """Of the loss per token, as in the training step."""
        return self._gradient(params, place_batch(self._sharding, batch), self._frozen)


def on_this_device(
    compute: ComputeConfig, loss_fn: LossFn, params: build.Params, *, rows: int, limit: int
) -> Evaluation:
    """An evaluation on the device that JAX takes by itself, without a mesh, of at most `limit` batches of `rows` (0:
    all). `params` are all parts that the loss sees.
    """

    def sums_of(params: build.Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, weight, sums = loss_fn(params, batch, None)
        return {**sums, "weight": weight}

    matmul = precision.choose(compute, jax.default_backend())
    compiled = jax.jit(precision.multiplying(matmul.kind, sums_of))
    return Evaluation(params, lambda batch: compiled(params, dict(batch)), add_up, iter, range(rows), limit)


def draw_samples(config: Config, task: Task, params: build.Params, accuracy: float | None) -> list[dict[str, Any]]:
    """What the model makes of the task's prompts, or else of `eval.sample_prompts`: {input, output, accuracy} each.

    `params` are all parts that the loss sees. Raises NotFinite where the scores of the next token are not finite.
    """
    prompts = task.prompts
    if prompts is None:
        prompts = {prompt: prompt for prompt in config.eval.sample_prompts}
    model = build.to_unrolled(build.model_params(params))
    options = SamplingOptions(
        max_tokens=config.eval.sample_tokens,
        temperature=config.eval.sample_temperature,
        seed=config.train.seed,
        truncate_prompt=True,
    )
    generator = Generator(config.model, config.compute, model, task.tokenizer)
    completions = generator.generate(list(prompts.values()), options)
    return [
        {"input": prompt, "output": completion.text, "accuracy": accuracy}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def make_gradient(loss_fn: LossFn, matmul: precision.Kind, mesh: Mesh) -> Any:
    """A jitted function of parameters, batch and frozen parameters: the gradient of the loss per token, as in the
    training step."""

    def mean_loss(params: Any, batch: dict[str, jax.Array], frozen: Any) -> jax.Array:
        loss_sum, weight_sum, _ = loss_fn({**frozen, **params}, batch, None)
        return loss_sum / jnp.maximum(weight_sum, 1.0)

    return jax.jit(on_mesh(mesh, precision.multiplying(matmul, jax.grad(mean_loss))))


def whole_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every parameter by its name, with the parts that other processes hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameter_name(path): multihost_utils.process_allgather(leaf, tiled=True) for path, leaf in leaves}
