"""How often a model calls the right function with the right arguments, on held-out conversations.

Every turn of the assistant is asked for by itself, after the true turns before it, so that one mistake counts once.
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
        """`right / total`, or None where there is nothing to count."""
        return self.right / self.total if self.total else None


@dataclasses.dataclass(frozen=True)
class ToolScores:
    """Turns that were right. Of those in which a function has to be called: `valid_json` (at least one call, and all of
    the turn well-formed), of these `right_tool` (the same functions, in order) and of these `right_arguments` (the same
    values). Of those in which none is to be called: `no_call`. Of all: `ended`, with `<|im_end|>`."""

    valid_json: Count
    right_tool: Count
    right_arguments: Count
    no_call: Count
    ended: Count


def score_tool_calls(
    conversations: Iterable[chat.Conversation], tokenizer: Tokenizer, generate: Generate
) -> ToolScores:
    """Scores of `generate`, which gets prompts and returns, for each, the ids it writes behind it.

    All three counts of calls are over all turns that have to call. Raises UserError for a tokenizer without the pieces
    of calls.
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
    """Whether a turn has well-formed calls, of the functions wanted, with the arguments wanted; each needs the one
    before."""
    calls = found.message.tool_calls
    valid = bool(calls) and not any(error.kind in MALFORMED for error in found.errors)
    tool = valid and [call.name for call in calls] == [call.name for call in wanted]
    same = tool and all(same_value(a.arguments, b.arguments) for a, b in zip(calls, wanted, strict=True))
    return valid, tool, same
