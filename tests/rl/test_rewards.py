"""What answers are worth: by calls, by running programs and bodies, by a reward model."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DecoderConfig, RLConfig
from smallcoder_jax.evaluate import completions, tool_calls
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import init_head
from smallcoder_jax.rl import questions, rewards
from smallcoder_jax.rl.questions import Body, Turn
from smallcoder_jax.rl.rewards import ALIKE, RIGHT, RIGHT_TOOL, WELL_FORMED, CheckedReward, RewardModel
from smallcoder_jax.rl.rollouts import Answer, Question
from smallcoder_jax.tokenizers import base, chat
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from smallcoder_jax.toolbox.functions import TOOLS
from tests.helpers import FLOAT32, tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(["def f(x):\n    return x + 1\n"] * 8, 300, 10_000)


@pytest.fixture(scope="module")
def graded(tokenizer: SentencePieceTokenizer) -> Any:
    """What a turn earns that should have made the calls `wanted`."""
    reward = CheckedReward(tokenizer, RLConfig())

    def grade(written: Message | list[int], *wanted: ToolCall) -> float:
        question = Question((1,), Turn(tuple(TOOLS.values()), wanted))
        ids = written if isinstance(written, list) else turn_ids(tokenizer, written)
        return float(reward([Answer(question, tuple(ids), True)])[0])

    return grade


def turn_ids(tokenizer: SentencePieceTokenizer, message: Message) -> list[int]:
    before = Conversation((Message("user", "?"),))
    prompt = chat.encode(before, tokenizer, reply=True).ids
    ids = chat.encode(Conversation((*before.messages, message)), tokenizer).ids[len(prompt) :].tolist()
    return ids[: ids.index(tokenizer.specials[base.IM_END]) + 1]


def calling(*calls: ToolCall, content: str = "") -> Message:
    return Message("assistant", content, calls)


PYTHON = ToolCall("execute_python", {"code": "print(6 * 7)"})
SEARCH = ToolCall("search_docs", {"query": "heap"})


def test_right_calls_earn_all_and_each_kind_of_mistake_its_share(graded: Any, tokenizer: Any) -> None:
    assert graded(calling(SEARCH), SEARCH) == RIGHT
    assert graded(calling(SEARCH, PYTHON), SEARCH, PYTHON) == RIGHT
    assert graded(calling(ToolCall("search_docs", {"query": "zzz"})), SEARCH) == RIGHT_TOOL
    assert graded(calling(PYTHON), SEARCH) == pytest.approx(WELL_FORMED)
    assert graded(calling(SEARCH), SEARCH, SEARCH) == pytest.approx(WELL_FORMED)
    assert graded(Message("assistant", "heap it is"), SEARCH) == 0
    cut = turn_ids(tokenizer, calling(SEARCH))[:-1]
    assert graded(cut, SEARCH) == 0
    unclosed = [i for i in turn_ids(tokenizer, calling(SEARCH)) if i != tokenizer.specials["</tool_call>"]]
    assert graded(unclosed, SEARCH) == 0
    assert graded([], SEARCH) == 0


def test_a_turn_that_is_to_call_nothing(graded: Any) -> None:
    assert graded(Message("assistant", "hello")) == RIGHT
    assert graded(calling(SEARCH)) == 0
    assert graded(Message("assistant", "")) == 0


def test_programs_are_right_by_what_they_print(graded: Any) -> None:
    assert graded(calling(ToolCall("execute_python", {"code": "x = 40\nprint(x + 2)"})), PYTHON) == RIGHT
    wrong = ["print(41)", "print(42)\nraise SystemExit(1)", "print(42)\n1/0", "\0"]
    for code in wrong:
        assert RIGHT_TOOL <= graded(calling(ToolCall("execute_python", {"code": code})), PYTHON) <= ALIKE, code
    shell = ToolCall("execute_bash", {"command": "seq 1 3 | tail -n 1"})
    assert graded(calling(ToolCall("execute_bash", {"command": "echo 3"})), shell) == RIGHT
    for command in ("echo 4", "echo 3\0"):
        assert RIGHT_TOOL <= graded(calling(ToolCall("execute_bash", {"command": command})), shell) <= ALIKE, command
    # Arguments that do not fit the schema are not run.
    more = ToolCall("execute_python", {"code": "print(42)", "more": 1})
    assert RIGHT_TOOL <= graded(calling(more), PYTHON) <= ALIKE


def test_what_a_test_prints_is_no_proof(graded: Any) -> None:
    code = "def f():\n    return 1"
    wanted = ToolCall("run_tests", {"code": code, "tests": "assert f() == 1"})
    empty = ToolCall("run_tests", {"code": "", "tests": "assert 1"})
    assert RIGHT_TOOL <= graded(calling(empty), wanted) <= ALIKE
    assert graded(calling(wanted), wanted) == RIGHT


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ({"code": "abcd", "aspect": "calls"}, 1.0),
        ({"code": "abcd", "aspect": "xyzuv"}, 0.5),
        ({"code": "ab", "aspect": "calls"}, (2 * 2 / 6 + 1) / 2),  # twice what matches over all characters
        ({"aspect": "calls"}, 0.5),
        ({"code": 4, "aspect": "calls"}, 0.5),
        ({}, 0.0),
    ],
)
def test_how_like_arguments_are(arguments: dict[str, Any], share: float) -> None:
    wanted = ToolCall("analyze_code", {"code": "abcd", "aspect": "calls"})
    assert rewards.likeness([ToolCall("analyze_code", arguments)], [wanted]) == pytest.approx(share)


def test_nearer_arguments_earn_more(graded: Any) -> None:
    wanted = ToolCall("analyze_code", {"code": "def f(x):\n    return x + 1\n", "aspect": "calls"})
    codes = ["", "def", "def f(x):\n    return", "def f(x):\n    return x + 2\n"]
    earned = [graded(calling(ToolCall("analyze_code", {"code": code, "aspect": "calls"})), wanted) for code in codes]
    assert earned == sorted(earned)
    assert earned[0] == pytest.approx(RIGHT_TOOL + (ALIKE - RIGHT_TOOL) / 2)
    assert earned[-1] < ALIKE < graded(calling(wanted), wanted) == RIGHT


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [nested(52), nested(500), 10**4250, -(10**4000), 1e308, None, True, {}, {"a": nested(60)}, "", "\0", "\u2028"],
)
def test_any_argument_gets_a_number(graded: Any, tokenizer: SentencePieceTokenizer, value: Any) -> None:
    for wanted in (SEARCH, PYTHON, ToolCall("execute_bash", {"command": "echo 3"})):
        (name,) = wanted.arguments
        for arguments in ({name: value}, {"more": value, **wanted.arguments}):
            text = json.dumps({"name": wanted.name, "arguments": arguments}, ensure_ascii=False)
            pieces = [tokenizer.specials[piece] for piece in ("<tool_call>", "</tool_call>", base.IM_END)]
            ids = [pieces[0], *tokenizer.encode(text), *pieces[1:]]
            assert 0.0 <= graded(ids, wanted) <= ALIKE


def test_text_beside_a_right_call_has_its_price(graded: Any, tokenizer: SentencePieceTokenizer) -> None:
    assert graded(calling(SEARCH, content="Let me look. " * 9), SEARCH) == pytest.approx(0.9)
    assert graded(calling(SEARCH, content=" \n"), SEARCH) == RIGHT
    wrong = calling(ToolCall("search_docs", {"query": "zzz"}), content="Let me look.")
    assert graded(wrong, SEARCH) == pytest.approx(RIGHT_TOOL * 0.9)
    answer = Answer(Question((1,), Turn(tuple(TOOLS.values()), (SEARCH,))), (), True)
    given = dataclasses.replace(answer, token_ids=tuple(turn_ids(tokenizer, calling(SEARCH, content="Look:"))))
    assert CheckedReward(tokenizer, RLConfig(surplus_price=0.0))([given])[0] == RIGHT
    assert CheckedReward(tokenizer, RLConfig(surplus_price=0.5))([given])[0] == pytest.approx(0.5)


def test_more_than_was_asked_for_is_not_right(graded: Any, tokenizer: SentencePieceTokenizer) -> None:
    assert graded(calling(SEARCH, SEARCH), SEARCH) == pytest.approx(WELL_FORMED)
    assert graded(calling(SEARCH, PYTHON), SEARCH) == pytest.approx(WELL_FORMED)
    more = ToolCall("search_docs", {**SEARCH.arguments, "limit": 3})
    assert graded(calling(more), SEARCH) == pytest.approx((RIGHT_TOOL + ALIKE) / 2)
    ids = turn_ids(tokenizer, calling(SEARCH))
    assert graded([*ids[:-1], *tokenizer.encode("There it is."), ids[-1]], SEARCH) == 0
    assert graded([*ids[:-1], *ids], SEARCH) == pytest.approx(WELL_FORMED)
    text = 'I would write <tool_call>{"name": "search_docs", "arguments": {"query": "heap"}}</tool_call>'
    inside = tokenizer.encode(text)
    assert graded([*inside, ids[-1]], SEARCH) == 0


def test_whatever_is_written_gets_a_number(tokenizer: SentencePieceTokenizer) -> None:
    """Seeded: true answers with parts taken out, doubled, moved or made up, and ids at random; by every grader."""
    rng = random.Random(5)
    reward = CheckedReward(tokenizer, RLConfig())
    tools = tuple(TOOLS.values())
    right = [
        turn_ids(tokenizer, calling(ToolCall(name, arguments), content=content))
        for name, arguments in (
            ("search_docs", {"query": "heap"}),
            ("analyze_code", {"code": "def f(x):\n    return x + 1\n", "aspect": "calls"}),
            ("analyze_code", {"code": nested(52), "aspect": 10**4250}),
        )
        for content in ("", "Look:\n")
    ]
    bodies = [
        tokenizer.encode("    return x + 1\n"),
        tokenizer.encode('    """\nx\n"""\n# y\n    return 1\n\n\nz\n'),
    ]
    texts = ('{"name": ', "[" * 2000, '{"a":' * 400, "9" * 5000, "1e999", "\\ud800", "\0")
    made_up = [tokenizer.encode(text) for text in texts]
    turn, none = Turn(tools, (SEARCH,)), Turn(tools, ())
    other = Turn(tools, (ToolCall("analyze_code", {"code": "x", "aspect": "calls"}),))
    body = Body("def f(x):\n", (("f(1)", "2"), ("f(2)", "3")), "nowhere")
    answers = []
    for _ in range(400):
        ids = list(rng.choice(right + bodies))
        for _ in range(rng.randrange(4)):
            start, stop = sorted(rng.choices(range(len(ids) + 1), k=2))
            change = rng.randrange(4)
            if change == 0:
                del ids[start:stop]
            elif change == 1:
                ids[start:start] = ids[start:stop]
            elif change == 2:
                ids[start:stop] = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(9))
            else:
                ids[start:start] = rng.choice(made_up)
        answers += [Answer(Question((1,), facts), tuple(ids), rng.random() < 0.8) for facts in (turn, none, other)]
        if rng.random() < 0.1:  # these are run
            answers.append(Answer(Question((1,), body), tuple(ids), True))
        completions.judge("def f(x):\n", tokenizer.decode(ids))
    rewards_N = reward(answers)
    assert np.all((rewards_N >= 0.0) & (rewards_N <= 1.0))
    assert len(set(rewards_N.tolist())) > 5
    written = [answer.token_ids for answer in answers if answer.question.facts is turn]
    asked = [Conversation((Message("user", "?"), calling(SEARCH)), tools)] * len(written)
    scores = tool_calls.score_tool_calls(asked, tokenizer, lambda prompts: written)
    assert 0 < scores.right_arguments.right <= scores.valid_json.right < scores.valid_json.total


def test_a_program_is_run_once(graded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = rewards.sandbox.run_python
    monkeypatch.setattr(rewards.sandbox, "run_python", lambda code, **k: runs.append(code) or run(code, **k))
    rewards.printed_by.cache_clear()
    for _ in range(3):
        assert graded(calling(ToolCall("execute_python", {"code": "print(21 * 2)"})), PYTHON) == RIGHT
    assert sorted(runs) == ["print(21 * 2)", "print(6 * 7)"]


def test_first_turns_of_conversations_are_questions(tokenizer: SentencePieceTokenizer) -> None:
    """The true turn earns all; the sides share no request; what cannot be written in time is not asked."""
    reward = CheckedReward(tokenizer, RLConfig())
    sides = {
        side: questions.from_conversations(tokenizer, side=side, count=400, seed=0, most_tokens=10_000)
        for side in ("train", "validation")
    }
    assert {question.ids for question in sides["train"]}.isdisjoint(question.ids for question in sides["validation"])
    for side, found in sides.items():
        assert len(found) > 20
        answers = []
        for question in found:
            text = tokenizer.decode(list(question.ids))
            assert text.endswith("assistant\n")
            turn = calling(*question.facts.calls, content="" if question.facts.calls else "Like this.")
            answers.append(Answer(question, tuple(turn_ids(tokenizer, turn)), True))
        assert set(reward(answers).tolist()) == {RIGHT}
        assert {bool(question.facts.calls) for question in found} == {True, False}
        lengths = [len(answer.token_ids) for answer in answers if answer.question.facts.calls]
        limit = int(np.median(lengths))
        fewer = questions.from_conversations(tokenizer, side=side, count=400, seed=0, most_tokens=limit)
        assert sum(bool(question.facts.calls) for question in fewer) < len(lengths)
        assert {question.ids for question in fewer} < {question.ids for question in found}


def reward_model(seed: int = 0, **changes: Any) -> tuple[LoadedModel, ByteTokenizer]:
    model: DecoderConfig = tiny_model(vocab_size=256, width=32, layers=2)
    params = build.init_params(model, FLOAT32, jax.random.key(seed))
    tokenizer = ByteTokenizer()
    head = init_head(model.width, jax.random.key(seed + 1))
    loaded = LoadedModel(model, FLOAT32, params, tokenizer, Path("somewhere"), {}, {"path": "somewhere"}, head)
    return dataclasses.replace(loaded, **changes), tokenizer


def test_the_score_of_a_reward_model_does_not_move_with_padding_or_company() -> None:
    loaded, tokenizer = reward_model()
    rng = np.random.default_rng(0)
    answers = [
        Answer(
            Question(tuple(rng.integers(0, 200, 3 + n).tolist())), tuple(rng.integers(0, 200, 2 * n + 1).tolist()), True
        )
        for n in range(7)
    ]
    together = RewardModel(loaded, tokenizer, 4, 0.0)(answers)
    assert together.shape == (7,)
    assert together.dtype == np.float32
    alone = RewardModel(loaded, tokenizer, 1, 0.0)
    for answer, score in list(zip(answers, together, strict=True))[::3]:
        assert alone([answer])[0] == pytest.approx(score, abs=1e-5)
    longer = Answer(Question((1,)), tuple(range(60)), False)  # pads the others to 64 places
    ended = dataclasses.replace(longer, ended=True)
    scores = RewardModel(loaded, tokenizer, 4, 0.25)([longer, *answers, ended])
    np.testing.assert_allclose(scores[1:-1], together, atol=1e-5)
    assert scores[0] == pytest.approx(scores[-1] - 0.25, abs=1e-5)  # it was cut off
    # By hand: the hidden state of the last token, without any padding.
    ids = jnp.array([answers[2].question.ids + answers[2].token_ids], jnp.int32)
    decoder: Any = build.bind(build.abstract_model(loaded.model, FLOAT32)[0], loaded.params)
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    hidden = np.asarray(decoder(ids, places, jnp.ones_like(ids)).states_BTD)
    head: Any = loaded.head
    expected = hidden[0, -1] @ np.asarray(head["kernel"])[:, 0] + float(head["bias"][0])
    assert together[2] == pytest.approx(expected, abs=1e-4)


def test_reward_models_that_do_not_fit_are_refused() -> None:
    loaded, tokenizer = reward_model()
    with pytest.raises(UserError, match="has no scalar head"):
        RewardModel(dataclasses.replace(loaded, head=None), tokenizer, 4, 0.0)
    other: Any = dataclasses.replace(loaded)
    other_tokenizer = ByteTokenizer()
    other_tokenizer.hash = "another"
    with pytest.raises(UserError, match="another tokenizer than the policy"):
        RewardModel(other, other_tokenizer, 4, 0.0)
    with pytest.raises(UserError, match=r"70 tokens, but .* context of 64"):
        RewardModel(loaded, tokenizer, 4, 0.0)([Answer(Question((1,) * 10), (1,) * 60, False)])
