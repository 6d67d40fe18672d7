"""Totals over batches, against a plain computation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.evaluate.perplexity import evaluate
from smallcoder_jax.models import build
from tests.helpers import FLOAT32, packed_batch, tiny_model


def test_totals_are_over_counted_targets_of_all_batches() -> None:
    model = tiny_model()
    graph, _ = build.abstract_model(model, FLOAT32)
    params = build.init_params(model, FLOAT32, jax.random.key(0))
    batches = [packed_batch(model, 2, 32, seed) for seed in (0, 1)]
    batches[1]["loss_weights"][:, :20] = 0  # unequal: a mean of means would be another number
    nats, correct, top5, tokens, size = 0.0, 0, 0, 0, 0
    for batch in batches:
        batch["bytes"] = 3 * batch["loss_weights"]
        decoder = build.bind(graph, params)
        given = (jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))
        logits = build.logits(decoder, decoder(*given).states_BTD)
        scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for row, column in zip(*np.nonzero(batch["loss_weights"]), strict=True):
            score = scores[row, column]
            rank = int(np.sum(score > score[batch["targets"][row, column]]))
            nats -= score[batch["targets"][row, column]]
            correct, top5, tokens, size = correct + (rank == 0), top5 + (rank < 5), tokens + 1, size + 3
    found = evaluate(model, FLOAT32, params, batches)
    assert found["tokens"] == tokens
    assert found["bytes"] == size
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert found["accuracy"] == correct / tokens
    assert found["top5_accuracy"] == top5 / tokens


def test_nothing_to_count() -> None:
    model = tiny_model()
    params = build.init_params(model, FLOAT32, jax.random.key(0))
    batch = packed_batch(model, 1, 16, 0)
    empty = {**batch, "loss_weights": 0 * batch["loss_weights"], "bytes": 0 * batch["loss_weights"]}
    with pytest.raises(UserError, match="no held-out text"):
        evaluate(model, FLOAT32, params, [empty])
