"""Minibatches on policy: their order, their advantages, and a place in them that can be returned to."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import RLConfig
from smallcoder_jax.rl.experience import Experience, grpo_rows, next_coefficient, ppo_rows, statistics
from smallcoder_jax.rl.rollouts import Answer, Question
from tests.rl.conftest import World
from tests.rl.tiny import rl_config

pytestmark = pytest.mark.usefixtures("standard_promotion")


def length_reward(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([sum(answer.token_ids) % 7 for answer in answers], np.float32)


def experience(world: World, seed: int = 2, **changes: Any) -> Experience:
    found = Experience(world.config, world.engine, world.questions, length_reward, ppo_rows)
    found.on_params(world.policy(seed))
    return found


def test_every_answer_is_once_in_every_inner_epoch_and_then_come_new_ones(world: World) -> None:
    batches = list(itertools.islice(experience(world), 8))  # two iterations of two epochs of 2 x 8 rows
    rows = [[row.tobytes() for row in batch["tokens"]] for batch in batches]
    epochs = [sorted(one + two) for one, two in zip(rows[::2], rows[1::2], strict=True)]
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3]
    assert len(set(epochs[0])) == 16
    assert rows[0] + rows[1] != rows[2] + rows[3]
    for batch in batches:
        assert {array.shape[0] for array in batch.values()} == {8}
        assert all(array.ndim == 2 for array in batch.values())


def test_at_first_only_values_are_learned_where_that_is_asked_for(world: World) -> None:
    """Two iterations of four batches: in the first no answer is better than another, its returns are as they were."""
    config = dataclasses.replace(world.config, rl=dataclasses.replace(world.config.rl, value_warmup=1))
    warming = Experience(config, world.engine, world.questions, length_reward, ppo_rows)
    warming.on_params(world.policy())
    for place, (batch, usual) in enumerate(itertools.islice(zip(warming, experience(world), strict=True), 8)):
        np.testing.assert_array_equal(batch["returns"], usual["returns"])
        expected = np.zeros_like(usual["advantages"]) if place < 4 else usual["advantages"]
        np.testing.assert_array_equal(batch["advantages"], expected)
        assert usual["advantages"].any()


def test_questions_are_asked_once_in_every_epoch_over_them(world: World) -> None:
    """20 questions, 8 in an iteration: 5 iterations are two epochs."""
    asked: list[Question] = []
    engine = world.engine

    class Listening:
        def answer(self, params: Any, questions: Sequence[Question], **options: Any) -> list[Answer]:
            asked.extend(questions)
            return engine.answer(params, questions, **options)

        rows = engine.rows

    config = dataclasses.replace(world.config, rl=dataclasses.replace(world.config.rl, inner_epochs=1))
    listening: Any = Listening()
    stream = Experience(config, listening, world.questions, length_reward, ppo_rows)
    stream.on_params(world.policy())
    for _ in range(10):
        next(stream)
    assert len(asked) == 40
    for half in (asked[:20], asked[20:]):
        assert {question.ids for question in half} == {question.ids for question in world.questions}
    assert asked[:20] != asked[20:]


def test_it_continues_from_any_place_to_the_bit(world: World) -> None:
    straight = experience(world)
    places, batches = [straight.get_state()], []
    for batch in itertools.islice(straight, 7):
        batches.append(batch)
        places.append(straight.get_state())
    assert [bool(place["rows"]) for place in places] == [False, True, True, True, False, True, True, True]
    for place, batch in zip(places, batches, strict=False):
        again = experience(world)
        again.set_state(json.loads(json.dumps(place)))
        found = next(again)
        assert found.keys() == batch.keys()
        for name, array in found.items():
            assert array.dtype == batch[name].dtype
            np.testing.assert_array_equal(array, batch[name])
    # In the middle of an iteration nothing is asked of a policy; after it, the one that is seen then answers.
    other = experience(world, seed=5)
    other.set_state(json.loads(json.dumps(places[3])))
    np.testing.assert_array_equal(next(other)["tokens"], batches[3]["tokens"])
    assert not np.array_equal(next(other)["log_probs"], batches[4]["log_probs"])


def test_ppo_pays_at_the_end_and_for_leaving_the_start() -> None:
    """Returns and advantages of two rows, written out."""
    rl = RLConfig(gamma=0.9, gae_lambda=0.8)
    weights = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], np.float32)
    generator = np.random.default_rng(0)
    log_probs, reference, values = (generator.normal(size=(2, 5)).astype(np.float32) * weights for _ in range(3))
    rows = {"loss_weights": weights, "log_probs": log_probs, "reference": reference, "values": values}
    found = ppo_rows(rl, rows, np.array([2.0, -1.0], np.float32), 0.1)
    cost = 0.1 * (log_probs - reference)
    raw = np.zeros((2, 5))
    following = 0.0
    for place in (3, 2, 1):
        reward = (2.0 if place == 3 else 0.0) - cost[0, place]
        next_value = values[0, place + 1] if place < 3 else 0.0
        following = reward + 0.9 * next_value - values[0, place] + 0.9 * 0.8 * following
        raw[0, place] = following
    raw[1, 2] = -1.0 - cost[1, 2] - values[1, 2]
    np.testing.assert_allclose(found["returns"], (raw + values) * weights, atol=1e-5)
    real = raw[weights > 0]
    np.testing.assert_allclose(
        found["advantages"], np.where(weights > 0, (raw - real.mean()) / real.std(), 0.0), atol=1e-5
    )


def test_grpo_compares_the_answers_to_one_question() -> None:
    rl = RLConfig(group_size=2, smallest_deviation=0.1)
    found = grpo_rows(rl, {}, np.array([1.0, 3.0, 5.0, 5.0, 0.5, 0.501], np.float32), 0.0)
    np.testing.assert_allclose(found["advantages"], [[-1], [1], [0], [0], [-0.005], [0.005]], atol=1e-4)
    np.testing.assert_allclose(found["alike_groups"], np.full((6, 1), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("learn", [ppo_rows, grpo_rows])
def test_answers_that_were_cut_off_teach_nothing_where_that_is_asked_for(world: World, learn: Any) -> None:
    engine = world.engine

    class Cut:
        """As the engine, but that every third answer has no end."""

        def answer(self, *given: Any, **options: Any) -> list[Answer]:
            answers = engine.answer(*given, **options)
            return [dataclasses.replace(answer, ended=i % 3 > 0) for i, answer in enumerate(answers)]

        rows = engine.rows

    cut: Any = Cut()
    batches = {}
    for masked in (False, True):
        config = dataclasses.replace(world.config, rl=dataclasses.replace(world.config.rl, mask_cut_off=masked))
        stream = Experience(config, cut, world.questions, length_reward, learn)
        stream.on_params(world.policy())
        parts = [next(stream), next(stream)]
        batches[masked] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    plain, masked = batches[False], batches[True]
    taught_N = np.any(masked["advantages"] != 0, axis=1)
    assert masked["ended"] == pytest.approx(10 / 16)
    assert taught_N.sum() <= 10 < np.any(plain["advantages"] != 0, axis=1).sum()
    np.testing.assert_array_equal(masked["advantages"][taught_N], plain["advantages"][taught_N])
    for name in ("loss_weights", "reward", "ended", "answer_tokens"):
        np.testing.assert_array_equal(masked[name], plain[name])
    if "returns" in plain:
        np.testing.assert_array_equal(masked["returns"][~taught_N], masked["values"][~taught_N])
        np.testing.assert_array_equal(masked["returns"][taught_N], plain["returns"][taught_N])


def test_statistics_are_of_answers() -> None:
    rows = {
        "loss_weights": np.array([[0, 1, 1], [0, 1, 0]], np.float32),
        "log_probs": np.array([[0, -1, -2], [0, -3, 0]], np.float32),
        "reference": np.array([[0, -1, -1], [0, -4, 0]], np.float32),
    }
    answers = [Answer(Question((1, 2)), (3, 4), True), Answer(Question((1, 2)), (3,), False)]
    found = statistics(rows, answers, np.array([0.5, 0.25], np.float32))
    np.testing.assert_allclose(found["start_kl"], [[np.e - 2], [np.exp(-1)]], rtol=1e-5)
    np.testing.assert_array_equal(found["answer_tokens"], [[2], [1]])
    np.testing.assert_array_equal(found["ended"], [[1], [0]])
    np.testing.assert_array_equal(found["reward"], [[0.5], [0.25]])


def test_the_log_gets_means_over_the_iteration(world: World) -> None:
    batches = list(itertools.islice(experience(world), 2))
    answers = world.engine.answer(world.policy(), [], samples=1, seed=0)
    assert answers == []
    for name in ("reward", "start_kl", "answer_tokens", "ended", "kl_coefficient"):
        values = np.concatenate([batch[name] for batch in batches])
        assert values.shape == (16, 1)
        assert (values == values[0]).all(), name
    tokens = np.concatenate([batch["loss_weights"] for batch in batches]).sum(axis=1)
    assert batches[0]["answer_tokens"][0, 0] == pytest.approx(tokens.mean())


def test_the_coefficient_goes_after_its_target_in_small_steps() -> None:
    fixed, adaptive = RLConfig(), RLConfig(kl_target=4.0)
    assert next_coefficient(fixed, 0.02, 100.0) == 0.02
    assert next_coefficient(adaptive, 0.02, 100.0) == pytest.approx(0.02 * 1.02)
    assert next_coefficient(adaptive, 0.02, 0.0) == pytest.approx(0.02 * 0.98)
    assert next_coefficient(adaptive, 0.02, 4.4) == pytest.approx(0.02 * 1.01)


def test_an_adapted_coefficient_is_part_of_the_state(world: World) -> None:
    config = dataclasses.replace(world.config, rl=dataclasses.replace(world.config.rl, kl_target=1e-3))
    stream = Experience(config, world.engine, world.questions, length_reward, ppo_rows)
    stream.on_params(world.policy())
    batches = list(itertools.islice(stream, 5))
    first, second = batches[0]["kl_coefficient"][0, 0], batches[4]["kl_coefficient"][0, 0]
    assert (first, second) == pytest.approx((0.02, 0.02 * 1.02))
    assert stream.get_state()["kl_coefficient"] == pytest.approx(0.02 * 1.02**2)


def test_an_evaluation_covers_every_question_once_and_repeats_itself(world: World) -> None:
    stream = experience(world)
    found = list(stream.evaluation(world.questions, 0, 8))
    assert [batch["reward"].shape for batch in found] == [(8, 1)] * 3
    counted = np.concatenate([batch["counted"] for batch in found])[:, 0]
    np.testing.assert_array_equal(counted, [1] * 20 + [0] * 4)
    answers = world.engine.answer(world.policy(), world.questions, samples=1, seed=world.config.train.seed)
    rewards = np.concatenate([batch["reward"] for batch in found])[:20, 0]
    np.testing.assert_array_equal(rewards, length_reward(answers))
    assert stream.get_state()["iteration"] == 0
    (limited,) = stream.evaluation(world.questions, 1, 8)
    np.testing.assert_array_equal(limited["reward"], found[0]["reward"])


def test_a_gain_is_the_mean_of_what_answers_earn_more_than_those_of_the_start(world: World) -> None:
    config = dataclasses.replace(world.config, rl=dataclasses.replace(world.config.rl, eval_answers=3))
    stream = Experience(config, world.engine, world.questions, length_reward, ppo_rows)
    stream.on_params(world.policy())
    found = {name: np.concatenate([batch[name] for batch in stream.evaluation(world.questions, 0, 8)])[:20, 0]
             for name in ("reward", "gain", "ended")}  # fmt: skip
    seed, asked = config.train.seed, world.questions
    theirs, starts = (
        length_reward(world.engine.answer(params, asked, samples=3, seed=seed)).reshape(20, 3).mean(axis=1)
        for params in (world.policy(), world.placed_start)
    )
    assert (theirs != starts).any()
    np.testing.assert_allclose(found["reward"], theirs, rtol=1e-6)
    np.testing.assert_allclose(found["gain"], theirs - starts, atol=1e-6)
    assert {round(3 * share, 5) % 1 for share in found["ended"]} == {0.0}
    stream.on_params(world.placed_start)
    for batch in stream.evaluation(world.questions, 0, 8):
        np.testing.assert_array_equal(batch["gain"], 0.0)
        np.testing.assert_allclose(batch["start_kl"], 0.0, atol=1e-6)


def test_an_evaluation_for_the_loss_alone_draws_no_answers_of_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = experience(world)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine, "start", lambda params: pytest.fail("the start was asked for"))
        alone = list(stream.evaluation(world.questions, 0, 8, beside_start=False))
    beside = list(stream.evaluation(world.questions, 0, 8))
    for one, other in zip(alone, beside, strict=True):
        assert not one.pop("gain").any()
        assert other.pop("gain").any()
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_too_few_questions_are_refused() -> None:
    world = World(rl_config(questions=32))
    with pytest.raises(UserError, match="20 different prompts"):
        Experience(world.config, world.engine, world.questions, length_reward, ppo_rows)
