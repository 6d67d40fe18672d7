"""The reward model: read at the last real token, learned from pairs, resumed exactly."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import loading, run
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import MeshConfig, PreferencesConfig, StageConfig
from smallcoder_jax.data.rows.pairs import EncodedPair, fill_pairs
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import head_scores, init_head, scores_at
from smallcoder_jax.stages import reward
from smallcoder_jax.stages.shared import pairs as preference_pairs
from tests.helpers import CAPTURES, FLOAT32
from tests.stages.pairs import assert_resumes, config_of, make_root, write_rule

pytestmark = pytest.mark.usefixtures("standard_promotion")
PROGRESS = Progress(sys.stderr)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("reward"))


@CAPTURES
def test_a_reward_does_not_move_with_padding_nor_with_its_neighbours(root: Path) -> None:
    config = config_of(root, "reward")
    loaded = loading.load(root / "start")
    pairs = preference_pairs.prepare(config, loaded.tokenizer, PROGRESS).sides["train"][:3]
    graph, _ = build.abstract_model(config.model, FLOAT32)
    head = init_head(config.model.width, jax.random.key(1))

    @jax.jit
    def score(batch: dict[str, jax.Array]) -> jax.Array:
        hidden_BTD = preference_pairs.hidden_states(build.bind(graph, loaded.params), batch, None).states_BTD
        return scores_at(head, hidden_BTD, preference_pairs.answers(batch["ends"]))

    def scores(rows: list[list[EncodedPair]], length: int, padding: int) -> np.ndarray:
        """[pair, answer], of rows that hold the pairs in order."""
        batch = fill_pairs(rows, len(rows), length, 3, padding)
        filled = batch["pair_weights"] > 0
        of_answers = np.asarray(score(jax.tree.map(jnp.asarray, batch))).reshape(len(rows), 2, 3)
        return of_answers.transpose(0, 2, 1)[filled]

    apart = [[pair] for pair in pairs]
    found = scores(apart, 48, 0)
    assert len(set(found.ravel().tolist())) == 6
    for rows, length, padding in ((apart, 80, 0), (apart, 80, 77), ([pairs], 80, 0), ([pairs[:1], pairs[1:]], 80, 5)):
        np.testing.assert_allclose(scores(rows, length, padding), found, rtol=1e-5, atol=1e-6)
    for row, pair in enumerate(pairs):
        for side, item in enumerate((pair.chosen, pair.rejected)):
            tokens, places = jnp.asarray(item.ids)[None], jnp.arange(len(item), dtype=jnp.int32)[None]
            alone = build.bind(graph, loaded.params)(tokens, places, jnp.ones_like(tokens)).states_BTD
            np.testing.assert_allclose(head_scores(head, alone)[0, -1], found[row, side], rtol=1e-5, atol=1e-6)


def test_it_learns_a_rule_and_says_so_by_criterion(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "reward", steps=60)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=60))
    trained = run.train(config, tmp_path / "run")
    tokenizer, size = loading.load(root / "start").tokenizer, config.train.batch_size
    pairs, order = (
        preference_pairs.prepare(config, tokenizer, PROGRESS),
        {"rows": range(size), "seed": config.train.seed},
    )
    batches = preference_pairs.batches_of(config, pairs, "train", {}, tokenizer, size, **order)
    # What is called tokens is those of the answers, and not the number of pairs.
    assert trained.tokens_seen == sum(int(batch["loss_weights"].sum()) for batch in itertools.islice(batches, 60))
    found = run.evaluate_run(tmp_path / "run", config, step="60")
    assert set(found) == {"step", "loss", "accuracy", "margin", "accuracy_at", "accuracy_hash"}
    assert found["accuracy"] > 0.95
    assert found["loss"] < 0.2
    for name, value in trained.evaluation.items():  # of the same pairs, on eight devices
        assert found[name] == pytest.approx(value, rel=1e-3)
    log = (tmp_path / "run" / "eval_log.csv").read_text().splitlines()
    assert log[1].split(",")[log[0].split(",").index("step")] == "0"  # what it was before is known
    assert float(log[1].split(",")[log[0].split(",").index("accuracy")]) < 0.8


@pytest.mark.slow
def test_it_continues_bit_for_bit(root: Path, tmp_path: Path) -> None:
    assert_resumes(root, config_of(root, "reward"), tmp_path)


def test_other_pairs_are_another_run(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "reward", steps=1)
    run.train(config, tmp_path / "run")
    write_rule(tmp_path / "fewer.jsonl", 100)
    other = dataclasses.replace(config, preferences=PreferencesConfig(sources=f"jsonl:{tmp_path / 'fewer.jsonl'}"))
    with pytest.raises(UserError, match=r"data\.preferences: the run has"):
        run.train(other, tmp_path / "run")


@CAPTURES
def test_the_loss_of_a_batch_is_that_of_its_pairs(root: Path) -> None:
    """Padding pairs count nothing, and the sums by criterion add up."""
    config = config_of(root, "reward")
    loaded = loading.load(root / "start")
    pairs = preference_pairs.prepare(config, loaded.tokenizer, PROGRESS)
    params = {"model": loaded.params, "head": init_head(config.model.width, jax.random.key(1))}
    loss_fn = jax.jit(lambda batch: reward.make_loss(config, pairs.criteria)(params, batch, None))
    count = len(pairs.sides["validation"])
    rows = range(count)  # more than are needed
    batches = preference_pairs.batches_of(
        config, pairs, "validation", {}, loaded.tokenizer, count, rows=rows, seed=0, num_epochs=1
    )
    loss, weight, sums = loss_fn(next(batches))
    assert float(weight) == count
    np.testing.assert_allclose(sums["loss"], loss)
    names = [f"weight {name}" for name in pairs.criteria]
    assert sum(float(sums[name]) for name in names) == count
    assert sum(float(sums[f"accuracy {name}"]) for name in pairs.criteria) == pytest.approx(float(sums["accuracy"]))
    assert abs(float(loss) / count - np.log(2)) < 0.05


def test_what_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "reward")
    with pytest.raises(UserError, match=r"mesh\.context=2"):
        run.train(dataclasses.replace(config, mesh=MeshConfig(context=2)), tmp_path / "context")
    with pytest.raises(UserError, match="starts from an existing model"):
        run.train(dataclasses.replace(config, stage=StageConfig(name="reward")), tmp_path / "none")
    with pytest.raises(UserError, match="has no head for rewards"):
        run.evaluate_run(root / "start", config)
