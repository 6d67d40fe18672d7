"""Evaluation while a model is trained: sums over held-out batches, and what it writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smallcoder_jax.base.distributed import StopVote
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.mesh import on_mesh, path_name, place_batch
from smallcoder_jax.models import build
from smallcoder_jax.ops import precision
from smallcoder_jax.train.step import LossFn
from smallcoder_jax.train.stop import StopRequest
from smallcoder_jax.train.sums import EvalMetrics
from smallcoder_jax.train.task import Task


def evaluate(
    eval_step: Any,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: Any,
    vote: StopVote,
    stop: StopRequest,
) -> EvalMetrics | None:
    """The sums of an evaluation over `batches` (numpy, this process's rows); None where a signal comes before."""
    total = EvalMetrics.empty()

    def counted(sums: dict[str, jax.Array]) -> EvalMetrics:
        values = jax.device_get(sums)
        vote.count(values)
        return total.merge(EvalMetrics.from_model_output(**values))

    pending = None
    for batch in batches:
        sums = {**eval_step(params, place_batch(sharding, batch)), **vote.cast(stop.requested)}
        if pending is not None:
            total = counted(pending)
        if vote.passed:
            return None
        pending = sums
    if pending is None:
        raise UserError("there is nothing to evaluate on: the validation split is empty")
    return counted(pending)


def draw_samples(config: Config, task: Task, params: build.Params, accuracy: float | None) -> list[dict[str, Any]]:
    """What the model makes of the task's prompts, or else of `eval.sample_prompts`: {input, output, accuracy} each.

    `params` are all that the loss sees. Raises NotFinite where the scores of the next token are not finite.
    """
    prompts = task.prompts
    if prompts is None:
        prompts = {prompt: prompt for prompt in config.eval.sample_prompts}
    decoder = build.to_unrolled(build.decoder_params(params))
    options = SamplingOptions(
        max_tokens=config.eval.sample_tokens,
        temperature=config.eval.sample_temperature,
        seed=config.train.seed,
        truncate_prompt=True,
    )
    generator = Generator(config.model, config.compute, decoder, task.tokenizer)
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
    """Every array of a tree by its path, with the parts that other processes hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): multihost_utils.process_allgather(leaf, tiled=True) for path, leaf in leaves}
