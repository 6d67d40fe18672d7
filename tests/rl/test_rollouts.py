"""Answers as rows: what is counted, and log-probabilities that are those of the generator and of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.lengths import quarter
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import head_scores
from smallcoder_jax.rl.rollouts import Answer, Question, RolloutEngine, fitting, pack_answers
from tests.helpers import FLOAT32
from tests.rl.conftest import World
from tests.rl.tiny import rl_config

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_what_was_written_is_counted_and_nothing_else() -> None:
    answers = [Answer(Question((9, 8, 7)), (1, 2), True), Answer(Question((5,)), (6,), False)]
    batch = pack_answers(answers, 6, pad_id=0)
    np.testing.assert_array_equal(batch["tokens"], [[9, 8, 7, 1, 0, 0], [5, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[8, 7, 1, 2, 0, 0], [6, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["loss_weights"], [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_log_probabilities_are_those_that_the_generator_reports(layers: str) -> None:
    """At temperature 1, where the generator's are of the model itself; both for the policy and for the start."""
    config = rl_config(temperature=1.0)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, layers=layers))
    world = World(config)
    policy = world.policy()
    answers = world.engine.answer(policy, world.questions[:8], samples=1, seed=3)
    rows = world.engine.rows(policy, answers)
    options = SamplingOptions(max_tokens=8, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    generator = Generator(config.model, config.compute, build.to_unrolled(policy["model"]), world.tokenizer)
    reported = generator.generate([question.ids for question in world.questions[:8]], options)
    for row, (answer, completion) in enumerate(zip(answers, reported, strict=True)):
        assert answer.token_ids == completion.token_ids
        written = rows["loss_weights"][row] > 0
        np.testing.assert_array_equal(rows["targets"][row, written], completion.token_ids)
        np.testing.assert_allclose(rows["log_probs"][row, written], completion.logprobs, atol=1e-4)
        assert not rows["log_probs"][row, ~written].any()
        assert not rows["values"][row, ~written].any()
    of_start = world.engine.rows({**world.placed_start, "critic": policy["critic"]}, answers)
    np.testing.assert_array_equal(of_start["log_probs"], of_start["reference"])
    np.testing.assert_array_equal(of_start["reference"], rows["reference"])
    assert np.abs(rows["log_probs"] - rows["reference"]).max() > 0.01


def test_values_and_temperature_are_those_of_the_written_out_forward_pass(world: World) -> None:
    policy = world.policy()
    answers = world.engine.answer(policy, world.questions[:4], samples=2, seed=0)
    assert [answer.question for answer in answers] == [question for question in world.questions[:4] for _ in "ab"]
    rows = world.engine.rows(policy, answers)
    graph, _ = build.abstract_model(world.config.model, world.config.compute)
    decoder: Any = build.bind(graph, jax.tree.map(jnp.asarray, jax.device_get(policy["model"])))
    hidden = decoder(*(jnp.asarray(rows[name]) for name in ("tokens", "positions", "segment_ids"))).states_BTD
    scores = np.asarray(build.logits(decoder, hidden)) / world.config.rl.temperature
    log_probs = np.asarray(jax.nn.log_softmax(scores))
    chosen = np.take_along_axis(log_probs, rows["targets"][..., None], axis=2)[..., 0]
    np.testing.assert_allclose(rows["log_probs"], chosen * rows["loss_weights"], atol=1e-4)
    critic = jax.tree.map(jnp.asarray, jax.device_get(policy["critic"]))
    other: Any = build.bind(graph, critic["model"])
    hidden = other(*(jnp.asarray(rows[name]) for name in ("tokens", "positions", "segment_ids"))).states_BTD
    values = np.asarray(head_scores(critic["head"], hidden)) * rows["loss_weights"]
    np.testing.assert_allclose(rows["values"], values, atol=1e-4)
    assert np.abs(values).max() > 0.1


def test_what_is_known_of_an_answer_does_not_move_with_its_row(world: World) -> None:
    """Rows of 32 are worked out at 8, 16, 24 or 32, several at a time."""
    policy = world.policy()
    prompts = [(254, *[65 + n] * length) for n, length in enumerate((20, 3, 9, 1, 14))]
    answers = [Answer(Question(prompt), (7, 8, 9)[: n % 3 + 1], True) for n, prompt in enumerate(prompts)]
    together = world.engine.rows(policy, answers)
    assert {quarter(len(answer.question.ids + answer.token_ids) - 1, 32) for answer in answers} == {8, 16, 24}
    for index, answer in enumerate(answers):
        alone = world.engine.rows(policy, [answer])
        for name, array in alone.items():
            np.testing.assert_allclose(array[0], together[name][index], atol=1e-5)
        assert alone["log_probs"].any()
        assert alone["values"].any()
    without = world.engine.rows({name: part for name, part in policy.items() if name != "critic"}, answers)
    assert "values" not in without


def test_samples_to_one_question_differ_and_a_seed_repeats_them(world: World) -> None:
    policy = world.policy()
    first, again, other = (world.engine.answer(policy, world.questions[:4], samples=4, seed=n) for n in (1, 1, 2))
    assert first == again
    assert len({answer.token_ids for answer in [*first, *other]}) == 32
    lengths = {len(answer.token_ids) for answer in first}
    assert max(lengths) <= world.config.rl.answer_tokens
    assert all(answer.ended or len(answer.token_ids) == 8 for answer in first)


def test_the_start_outlives_the_parameters_that_the_policy_begins_with(world: World) -> None:
    """The training step gives them away with its first update."""
    start = build.init_params(world.config.model, FLOAT32, jax.random.key(1))
    engine = RolloutEngine(world.config, world.tokenizer, start)
    jax.tree.map(lambda leaf: leaf.delete(), start)
    policy = world.policy()
    answers = world.engine.answer(policy, world.questions[:8], samples=1, seed=0)
    expected = world.engine.rows(policy, answers)["reference"]
    np.testing.assert_array_equal(engine.rows(policy, answers)["reference"], expected)


def test_prompts_that_leave_no_room_or_repeat_are_left_out() -> None:
    config = rl_config()
    room = config.train.sequence_length - config.rl.answer_tokens
    kept = fitting([Question((1,) * length) for length in (room + 1, room, 3, 3)], config)
    assert [len(question.ids) for question in kept] == [room, 3]
    with pytest.raises(UserError, match=r"none of 1 prompts is at most .* = 24 tokens"):
        fitting([Question((1,) * 25)], config)
