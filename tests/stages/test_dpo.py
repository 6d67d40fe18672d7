"""DPO: nothing is preferred at the start, the better answer afterwards, beside a reference that stays."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import loading, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DpoConfig, StageConfig
from smallcoder_jax.data.rows.pairs import fill_pairs
from smallcoder_jax.models import build
from smallcoder_jax.stages import dpo
from smallcoder_jax.stages.shared import pairs as preference_pairs
from tests.helpers import CAPTURES, FLOAT32
from tests.stages.pairs import LENGTH, assert_resumes, config_of, make_root

pytestmark = pytest.mark.usefixtures("standard_promotion")
PROGRESS = Progress(sys.stderr)


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("dpo"))


def log_probs_of(model: Any) -> Any:
    return jax.jit(lambda batch: dpo.answer_log_probs(model, preference_pairs.hidden_states(model, batch, None), batch))


@CAPTURES
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(root: Path) -> None:
    config = config_of(root, "dpo")
    loaded = loading.load(root / "start")
    pairs = preference_pairs.prepare(config, loaded.tokenizer, PROGRESS).sides["train"][:5]
    graph, _ = build.abstract_model(config.model, FLOAT32)
    decoder = build.bind(graph, loaded.params)
    logs_of = jax.jit(lambda *inputs: jax.nn.log_softmax(build.logits(decoder, decoder(*inputs).states_BTD)))
    rows = [pairs[:1], pairs[1:3], pairs[3:]]
    batch = on_device(fill_pairs(rows, 4, 2 * LENGTH, 2, loaded.tokenizer.pad_id))
    found = np.asarray(log_probs_of(decoder)(batch)).reshape(4, 2, 2)
    filled = np.asarray(batch["pair_weights"]) > 0
    assert filled.sum() == 5
    assert not found.transpose(0, 2, 1)[~filled].any()
    found = found.transpose(0, 2, 1)[filled]
    for row, pair in enumerate(pairs):
        for side, item in enumerate((pair.chosen, pair.rejected)):
            count = len(item)
            tokens, places = jnp.asarray(item.ids[None, :-1]), jnp.arange(count - 1, dtype=jnp.int32)[None]
            logs = np.asarray(logs_of(tokens, places, jnp.ones_like(tokens)))[0]
            of_targets = logs[np.arange(count - 1), item.ids[1:]]
            np.testing.assert_allclose(found[row, side], of_targets[item.counted[1:]].sum(), rtol=1e-4)


def test_it_learns_a_rule_from_where_it_started(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "dpo", steps=60, dpo=DpoConfig(beta=0.5))
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=60))
    run.train(config, tmp_path / "run")
    log = (tmp_path / "run" / "eval_log.csv").read_text().splitlines()
    first = dict(zip(log[0].split(","), log[1].split(","), strict=True))
    assert first["step"] == "0"
    assert float(first["loss"]) == pytest.approx(np.log(2), abs=1e-4)
    assert float(first["margin"]) == pytest.approx(0, abs=1e-4)
    assert float(first["chosen_reward"]) == pytest.approx(0, abs=1e-4)
    assert float(first["chosen_log_prob"]) < 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in steps for name in line} > set(preference_pairs.APART)
    found = run.evaluate_run(tmp_path / "run", config, step="60")
    assert found["margin"] == pytest.approx(found["chosen_reward"] - found["rejected_reward"], abs=1e-4)
    fallen = (found["rejected_log_prob"] - float(first["rejected_log_prob"])) * config.dpo.beta
    assert found["rejected_reward"] == pytest.approx(fallen, abs=1e-2)
    assert found["accuracy"] > 0.95
    assert found["margin"] > 1
    assert found["loss"] < 0.3


@pytest.mark.slow
def test_it_continues_bit_for_bit(root: Path, tmp_path: Path) -> None:
    assert_resumes(root, config_of(root, "dpo"), tmp_path)


@CAPTURES
def test_the_reference_goes_with_its_pair(root: Path) -> None:
    config = config_of(root, "dpo")
    loaded = loading.load(root / "start")
    pairs = preference_pairs.prepare(config, loaded.tokenizer, PROGRESS)
    columns = dpo.reference_log_probs(config, loaded, pairs)
    graph, _ = build.abstract_model(config.model, config.compute)
    decoder = build.bind(graph, loaded.params)
    batches = preference_pairs.batches_of(config, pairs, "train", columns, loaded.tokenizer, 16, rows=range(16), seed=5)
    batch = on_device(next(batches))
    assert batch["reference"].shape == (*batch["pair_weights"].shape, 2)
    again = log_probs_of(decoder)(batch)
    np.testing.assert_allclose(
        np.asarray(again).reshape(16, 2, -1).transpose(0, 2, 1), batch["reference"], rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "dpo", steps=1)
    with pytest.raises(UserError, match="starts from an existing model"):
        run.train(dataclasses.replace(config, stage=StageConfig(name="dpo")), tmp_path / "none")
    run.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.beta: the run has 0.1, now 0.2"):
        run.train(dataclasses.replace(config, dpo=DpoConfig(beta=0.2)), tmp_path / "run")
