"""Measures how well a model predicts held-out text.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.models.family import with_own_losses
from smallcoder_jax.train.evaluation import on_this_device
from smallcoder_jax.train.step import Batch
from smallcoder_jax.train.sums import language_summary, ratio


def evaluate(
    model: ModelConfig, compute: ComputeConfig, params: build.Params, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """The measures over `batches` (see `data.rows.documents`), with `params` in the layout of `compute.layers`.

    `loss` is in nats per target. `perplexity` and `bits_per_byte` follow from it, and `accuracy` and `top5_accuracy`
    from the ranks of the targets. `tokens` and `bytes` (UTF-8) are the totals. What the model itself reports is added
    (`Family.logged`). Sums within a batch are float32, and over batches float64. Raises UserError when there are no
    targets.
    """
    graph, _ = build.abstract_model(model, compute)

    def loss_fn(params: build.Params, batch: Batch, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        module = build.bind(graph, params)
        hidden = module(batch["tokens"], batch["positions"], batch["segment_ids"], key)
        loss, weight, sums = losses.language_model(
            hidden.states_BTD.reshape(-1, model.width),
            module.unembedding(),
            batch["targets"].reshape(-1),
            batch["loss_weights"].reshape(-1),
            0.0,
        )
        loss, sums = with_own_losses(loss, weight, sums, hidden)
        return loss, weight, {**sums, "bytes": jnp.sum(batch["bytes"])}

    evaluation = on_this_device(compute, loss_fn, params, rows=0, limit=0)
    sums = evaluation.add(map(evaluation.score, batches)) or {}
    if not sums.get("weight") or not sums["bytes"]:
        raise UserError("there is no held-out text to evaluate on; prepare more data or raise data.validation_fraction")
    own = {name: ratio(sums[name], sums["weight"]) for name in family_of(model).logged(model)}
    return {**language_summary(sums), **own, "tokens": sums["weight"], "bytes": sums["bytes"]}
