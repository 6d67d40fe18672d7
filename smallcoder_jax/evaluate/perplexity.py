"""How well a model predicts held-out text.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax import losses
from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.errors import UserError
from smallcoder_jax.models import build


def evaluate(
    model: ModelConfig, compute: ComputeConfig, params: build.Params, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Totals over `batches` of `data.pipeline.validation_batches`, with `params` in the layout of `compute.layers`.

    `loss`: nats per target. `perplexity`: its exponential. `accuracy`: share of targets that rank first.
    `bits_per_byte`: nats / ln 2 / UTF-8 bytes of the counted targets. `tokens`, `bytes`: what was counted. Sums of one
    batch are float32, over batches float64. Raises UserError where nothing is counted.
    """
    graph, _ = build.abstract_model(model, compute)

    @jax.jit
    def sums_of(params: build.Params, batch: dict[str, Array]) -> dict[str, Array]:
        decoder = build.bind(graph, params)
        hidden_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
        weights_X = batch["loss_weights"].reshape(-1)
        _, tokens, sums = losses.language_model(
            hidden_BTD.reshape(-1, model.width),
            decoder.unembedding(),
            batch["targets"].reshape(-1),
            weights_X,
            0.0,
        )
        return {**sums, "tokens": tokens, "bytes": jnp.sum(batch["bytes"].reshape(-1) * weights_X)}

    totals = dict.fromkeys(("nll", "correct", "tokens", "bytes"), 0.0)
    keys = ("tokens", "targets", "positions", "segment_ids", "loss_weights", "bytes")
    for batch in batches:
        sums = jax.device_get(sums_of(params, {key: batch[key] for key in keys}))
        totals = {name: total + float(sums[name]) for name, total in totals.items()}
    if not totals["tokens"] or not totals["bytes"]:
        raise UserError("there is no held-out text to evaluate on; prepare more data or raise data.validation_fraction")
    loss = totals["nll"] / totals["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond it, exp overflows
        "accuracy": totals["correct"] / totals["tokens"],
        "bits_per_byte": totals["nll"] / math.log(2) / totals["bytes"],
        "tokens": totals["tokens"],
        "bytes": totals["bytes"],
    }
