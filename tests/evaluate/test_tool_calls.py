"""Scores of tool calls: an oracle has all, each kind of mistake loses what it should and no more."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest

from smallcoder_jax.evaluate.tool_calls import Count, Generate, ToolScores, call_levels, score_tool_calls
from smallcoder_jax.tokenizers import base, chat
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_parser import parse
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from smallcoder_jax.toolbox.functions import TOOLS

SEARCH = ToolCall("search_docs", {"query": "heap", "limit": 2})
RUN = ToolCall("execute_python", {"code": "print(1)\n"})
ONE = Conversation(
    (Message("user", "heap?"), Message("assistant", "", (SEARCH,)), Message("tool", "x"), Message("assistant", "x")),
    tuple(TOOLS.values()),
)
TWO = Conversation(
    (
        Message("user", "twice"),
        Message("assistant", "Both:", (RUN, SEARCH)),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "", (RUN,)),
    ),
    tuple(TOOLS.values()),
)
NONE = Conversation((Message("user", "hi"), Message("assistant", "hello\n")), ONE.tools)
CONVERSATIONS = [ONE, TWO, NONE]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(["def f(x):\n    return x + 1\n"] * 8, 300, 10_000)


def writer(tokenizer: SentencePieceTokenizer, change: Callable[[Message], Message] = lambda one: one) -> Generate:
    """Writes the true turn, changed."""
    answers = {}
    for one in CONVERSATIONS:
        for index, message in enumerate(one.messages):
            if message.role == "assistant":
                before = Conversation(one.messages[:index], one.tools)
                prompt = chat.encode(before, tokenizer, reply=True).ids.tolist()
                after = Conversation((*before.messages, change(message)), one.tools)
                answers[tuple(prompt)] = chat.encode(after, tokenizer).ids.tolist()[len(prompt) :]

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [answers[tuple(prompt)] for prompt in prompts]

    return generate


def score(tokenizer: SentencePieceTokenizer, generate: Generate) -> ToolScores:
    return score_tool_calls(CONVERSATIONS, tokenizer, generate)


def rights(scores: ToolScores) -> list[int]:
    counts = [getattr(scores, field.name) for field in dataclasses.fields(scores)]
    assert [count.total for count in counts] == [3, 3, 3, 2, 5]
    return [count.right for count in counts]


def test_an_oracle_has_all(tokenizer: SentencePieceTokenizer) -> None:
    scores = score(tokenizer, writer(tokenizer))
    assert rights(scores) == [3, 3, 3, 2, 5]
    assert scores.right_arguments.share == 1.0
    assert Count(0, 0).share is None


def changed(**arguments: object) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        calls = tuple(ToolCall(call.name, {**call.arguments, **arguments}) for call in message.tool_calls)
        return dataclasses.replace(message, tool_calls=calls)

    return change


def renamed(name: str) -> Callable[[Message], Message]:
    return lambda one: dataclasses.replace(one, tool_calls=tuple(ToolCall(name, c.arguments) for c in one.tool_calls))


CHANGES: dict[str, tuple[Callable[[Message], Message], list[int]]] = {
    "no calls": (lambda one: dataclasses.replace(one, tool_calls=()), [0, 0, 0, 2, 5]),
    "always a call": (lambda one: dataclasses.replace(one, tool_calls=one.tool_calls or (RUN,)), [3, 3, 3, 0, 5]),
    "half the calls": (lambda one: dataclasses.replace(one, tool_calls=one.tool_calls[:1]), [3, 2, 2, 2, 5]),
    "calls in another order": (
        lambda one: dataclasses.replace(one, tool_calls=one.tool_calls[::-1]), [3, 2, 2, 2, 5]),
    "another tool": (renamed("run_tests"), [3, 0, 0, 2, 5]),
    "a tool that is not there": (renamed("rm"), [3, 0, 0, 2, 5]),
    "other code": (changed(code="print(2)\n"), [3, 3, 0, 2, 5]),
    "a number as text": (changed(limit="2"), [3, 3, 0, 2, 5]),
    "other words": (lambda one: dataclasses.replace(one, content="So:"), [3, 3, 3, 2, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_mistake_costs_its_own(name: str, tokenizer: SentencePieceTokenizer) -> None:
    change, expected = CHANGES[name]
    assert rights(score(tokenizer, writer(tokenizer, change))) == expected


def test_broken_json_and_turns_without_end(tokenizer: SentencePieceTokenizer) -> None:
    good = writer(tokenizer)
    brace = tokenizer.encode("}")[0]
    assert rights(score(tokenizer, lambda prompts: [ids[:-2] for ids in good(prompts)])) == [3, 3, 3, 2, 0]
    broken = [[i for i in ids if i != brace] for ids in good(_prompts(tokenizer))]
    assert rights(score(tokenizer, lambda _: broken)) == [0, 0, 0, 2, 5]
    behind = [[*ids[:-2], *tokenizer.encode(" so"), *ids[-2:]] for ids in good(_prompts(tokenizer))]
    assert rights(score(tokenizer, lambda _: behind)) == [0, 0, 0, 2, 5], "text behind a call is not well-formed"


@pytest.mark.parametrize(
    "body", ['{"name": "f", "parameters": {"a": 1}}', '{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f"}']
)
def test_a_score_is_strict_where_a_reader_is_not(body: str, tokenizer: SentencePieceTokenizer) -> None:
    start, stop, end = (tokenizer.specials[piece] for piece in ("<tool_call>", "</tool_call>", base.IM_END))
    for text, strict in ((body, False), ('{"name": "f", "arguments": {"a": 1}}', True)):
        found = parse([start, *tokenizer.encode(text), stop, end], tokenizer, [{"function": {"name": "f"}}])
        assert len(found.message.tool_calls) == 1
        assert call_levels(found, found.message.tool_calls) == (strict,) * 3


def _prompts(tokenizer: SentencePieceTokenizer) -> list[list[int]]:
    asked: list[list[int]] = []

    def listen(prompts: Sequence[list[int]]) -> list[list[int]]:
        asked.extend(prompts)
        return [[] for _ in prompts]

    score(tokenizer, listen)
    return asked


def test_an_untrained_model_has_none(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(0)
    scores = score(tokenizer, lambda prompts: [rng.choices(range(tokenizer.vocab_size), k=60) for _ in prompts])
    assert [scores.valid_json.right, scores.right_tool.right, scores.right_arguments.right] == [0, 0, 0]
    assert tokenizer.specials[base.IM_END] < tokenizer.vocab_size
