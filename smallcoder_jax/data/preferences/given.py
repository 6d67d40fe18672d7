"""Converts a row of a data set to a preference, for the columns and formats that such data sets have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smallcoder_jax.data.conversations import given_rows
from smallcoder_jax.data.preferences.pair import Preference
from smallcoder_jax.data.sources.cells import text_of, without_gaps
from smallcoder_jax.tokenizers.chat import Message, from_json, to_json
from smallcoder_jax.tokenizers.chat_wire import from_wire, to_wire

_ANSWERS = ("chosen", "rejected")
_OWN = ("criteria", "reason", "provenance")
WANTED = (*_ANSWERS, *_OWN, *given_rows.ASKING, *given_rows.UNUSED)
EXPECTED = (
    "chosen and rejected, which are texts, messages or lists of messages; and prompt, in the same forms, or the "
    "question of a dialog; without any, the prompt is what both answers begin with"
)
_Turns = list[dict[str, Any]]


def preference_of(row: Mapping[str, Any], provenance: Mapping[str, Any]) -> Preference:
    """The preference of a row. `provenance` is used for a row that does not state its own.

    Answers that are texts continue a `prompt` that is a text, or the text that both begin with. In all other cases the
    prompt is a conversation whose next turn is the answer. Raises ValueError or UserError that says what is missing,
    unknown, or the same in both answers.
    """
    if not any(name in row for name in _ANSWERS):
        raise ValueError("no chosen and no rejected")
    row = without_gaps(row)
    given_rows.refuse_unused(row)
    if missing := [name for name in _ANSWERS if row.get(name) in (None, [], {})]:
        raise ValueError(f"no {missing[0]}")
    answers = [row[name] for name in _ANSWERS]
    around = {name for name in given_rows.ASKING if row.get(name) not in (None, "", [], {})}
    given = row.get("prompt") or ""
    texts = all(isinstance(value, str) for value in (given, *answers)) and around <= {"prompt"}
    prompt, chosen, rejected = _texts(given, *map(text_of, answers)) if texts else _talk(row, answers)
    own = {key: row[key] for key in _OWN if row.get(key) is not None}
    found = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "provenance": dict(provenance), **own}
    return Preference.from_json(from_json(to_json(found, "the pair")))  # exactly as after storing and reading


def _texts(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers that are texts. Without a prompt, the texts are split where they start to differ, with a space
    at that point counted as part of the answers."""
    if prompt:
        return text_of(prompt), chosen, rejected
    most = min(len(chosen), len(rejected))
    prompt = chosen[: next((i for i in range(most) if chosen[i] != rejected[i]), most)].removesuffix(" ")
    if not prompt.strip():
        raise ValueError("no prompt, and the answers do not begin with one")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _talk(row: Mapping[str, Any], answers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Prompt and answers of a conversation, in the format of `Preference.to_json`."""
    before, tools = _before(row), given_rows.tools_of(row)
    prompt = row.get("prompt")
    if isinstance(prompt, dict) and "messages" in prompt:
        before, tools = given_rows.turns_of(prompt["messages"]), prompt.get("tools") or tools
    turns = [None if _is_reply(answer) else _turns_of(answer) for answer in answers]
    chosen, rejected = turns
    if chosen is not None and rejected is not None:
        shared = _shared(chosen, rejected)
        before = _joined(before, shared)
        turns = [chosen[len(shared) :], rejected[len(shared) :]]
    if not before:
        raise ValueError("no prompt, and the answers do not begin with one")
    conversation = from_wire({"messages": before, "tools": tools})
    replies = [
        answer if own is None else _reply(before, own, tools, name)
        for name, answer, own in zip(_ANSWERS, answers, turns, strict=True)
    ]
    return to_wire(conversation), *replies


def _before(row: Mapping[str, Any]) -> _Turns:
    """The turns before the answers that the row holds separately from the answers."""
    prompt = row.get("prompt")
    if isinstance(prompt, dict):
        return [] if "messages" in prompt else given_rows.turns_of([prompt])
    asked = any(row.get(name) not in (None, "", []) for name in (*given_rows.ASKED, *given_rows.MORE))
    if asked:  # a list of messages in addition to a question repeats the prompt with the chosen answer
        return given_rows.talk_of({name: row[name] for name in row if name not in given_rows.TALKS})
    if any(row.get(name) for name in given_rows.TALKS):
        turns = given_rows.talk_of(row)
        return turns if turns[-1].get("role") != "assistant" else []
    return []


def _is_reply(answer: Any) -> bool:
    """Whether an answer is an object of content and calls, the format that this package writes."""
    return isinstance(answer, dict) and not {"role", "from"} & answer.keys()


def _turns_of(answer: Any) -> _Turns:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": text_of(answer)}]
    return given_rows.answer_turns(answer)


def _shared(chosen: _Turns, rejected: _Turns) -> _Turns:
    """The turns with which both begin, at most all but the last turn of each."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return chosen[:count]


def _joined(before: _Turns, shared: _Turns) -> _Turns:
    """The prompt together with the turns that the answers share. In some data sets these repeat the prompt, in others
    they continue it."""
    if not shared or shared == before[-len(shared) :]:
        return before
    if not before or before == shared[-len(before) :]:
        return shared
    if shared[0].get("role") == "assistant":
        return [*before, *shared]
    raise ValueError("the answers begin with another conversation than the prompt")


def _reply(before: _Turns, own: _Turns, tools: list[Any], name: str) -> Any:
    if len(own) != 1 or own[0].get("role") != "assistant":
        roles = ", ".join(str(turn.get("role")) for turn in own)
        raise ValueError(f"{name} has the turns {roles}; expected one of the assistant after the shared turns")
    message: Message = from_wire({"messages": [*before, *own], "tools": tools}).messages[-1]
    calls = [
        to_json({"name": call.name, "arguments": call.arguments}, name) for call in message.tool_calls
    ]  # in the format of the chat template
    return {"content": message.content, "calls": calls}
