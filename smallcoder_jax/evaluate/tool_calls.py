"""Measures how often a model calls the right function with the right arguments on held-out conversations.

Each turn of the assistant is generated separately, after the true turns before it, so that a mistake counts only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from smallcoder_jax.tokenizers import chat
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.chat_parser import MALFORMED, Parsed, parse, same_value

Generate = Callable[[Sequence[list[int]]], Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Count:
    """`right` of `total`."""

    right: int
    total: int

    @property
    def share(self) -> float | None:
        """`right / total`, or None when `total` is 0."""
        return self.right / self.total if self.total else None


@dataclasses.dataclass(frozen=True)
class ToolScores:
    """Counts of right turns.

    Of the turns that have to call a function: `valid_json` (at least one call, and all of the turn is well-formed),
    `right_tool` (also the right functions, in order) and `right_arguments` (also the right values). Of the turns that
    should call none: `no_call`. Of all turns: `ended`, with `<|im_end|>`.
    """

    valid_json: Count
    right_tool: Count
    right_arguments: Count
    no_call: Count
    ended: Count


def score_tool_calls(
    conversations: Iterable[chat.Conversation], tokenizer: Tokenizer, generate: Generate
) -> ToolScores:
    """The scores of `generate`, which maps prompts to the ids that the model writes after each.

    All three counts of calls have the number of turns that have to call as their total. Raises UserError for a
    tokenizer without the pieces of calls.
    """
    turns = [
        (chat.Conversation(conversation.messages[:index], conversation.tools), message)
        for conversation in conversations
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and index
    ]
    prompts = [chat.encode(before, tokenizer, reply=True).ids.tolist() for before, _ in turns]
    written = generate(prompts)
    valid, tool, arguments, without, ended = [], [], [], [], []
    for (before, wanted), ids in zip(turns, written, strict=True):
        found = parse(ids, tokenizer, before.tools)
        ended.append(found.ended)
        if not wanted.tool_calls:
            without.append(not found.message.tool_calls and not found.errors)
            continue
        levels = call_levels(found, wanted.tool_calls)
        for counts, right in zip((valid, tool, arguments), levels, strict=True):
            counts.append(right)
    return ToolScores(*(Count(sum(counts), len(counts)) for counts in (valid, tool, arguments, without, ended)))


def call_levels(found: Parsed, wanted: tuple[chat.ToolCall, ...]) -> tuple[bool, bool, bool]:
    """Whether a turn has well-formed calls, whether the functions are right too, and whether the arguments are, too."""
    calls = found.message.tool_calls
    valid = bool(calls) and not any(error.kind in MALFORMED for error in found.errors)
    tool = valid and [call.name for call in calls] == [call.name for call in wanted]
    same = tool and all(same_value(a.arguments, b.arguments) for a, b in zip(calls, wanted, strict=True))
    return valid, tool, same
