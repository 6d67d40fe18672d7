"""Preferences from conversations that call functions: the correct turn of the assistant, and one with a mistake.

Only the first turn of a generated conversation is used. It needs no responses, so that nothing is executed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smallcoder_jax.data.conversations.generate import Draft, draw
from smallcoder_jax.data.preferences.pair import Preference, Reply
from smallcoder_jax.tokenizers.chat import ToolCall, from_json
from smallcoder_jax.toolbox.functions import TOOLS

FORMAT = 1  # increased whenever the same seed starts to give other pairs
_Mistake = tuple[Reply, str]  # a wrong reply, and what is wrong with it


def call_pairs(side: str, *, count: int, seed: int) -> Iterator[Preference]:
    """`count` pairs whose requests are on `side` of the split, each from a different conversation."""
    index = 0
    while count:
        draft = draw(seed, index)
        if draft.side == side:
            yield _pair_of(draft, random.Random(f"call|{FORMAT}|{seed}|{index}"))
            count -= 1
        index += 1


def _pair_of(draft: Draft, rng: random.Random) -> Preference:
    plan = draft.plan
    if not plan.steps:
        chosen, criterion = Reply(plan.answer(())), "needless_call"
        rejected, reason = _needless_call(plan.request, draft.tools, rng)
    else:
        calls = plan.steps[0](())
        chosen = Reply("", tuple(_text_of(call) for call in calls))
        for criterion in rng.sample(list(CRITERIA), len(CRITERIA)):
            if mistake := CRITERIA[criterion](calls, draft.tools, rng):
                break
        else:
            raise AssertionError(f"{calls} cannot be made wrong")  # impossible, because a call can always be omitted
        rejected, reason = mistake
    return Preference(draft.prompt, chosen, rejected, criterion, reason, draft.provenance)


def _text_of(call: ToolCall) -> str:
    """The text of a call in the format of the chat template."""
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


def _with(calls: Sequence[ToolCall], index: int, text: str) -> Reply:
    return Reply("", tuple(text if i == index else _text_of(call) for i, call in enumerate(calls)))


def _schema(name: str) -> dict[str, Any]:
    return TOOLS[name]["function"]["parameters"]


def _call_with(name: str, text: str) -> ToolCall:
    """A call whose arguments match the schema and are all `text`, except where the schema lists the values."""
    schema = _schema(name)
    return ToolCall(name, {key: schema["properties"][key].get("enum", [text])[0] for key in schema["required"]})


def _wrong_tool(calls: Sequence[ToolCall], offered: Sequence[str], rng: random.Random) -> _Mistake | None:
    index = rng.randrange(len(calls))
    name = rng.choice([tool for tool in offered if tool != calls[index].name])
    text = next(value for value in calls[index].arguments.values() if isinstance(value, str))
    return _with(calls, index, _text_of(_call_with(name, text))), f"calls {name} and not {calls[index].name}"


def _wrong_argument(calls: Sequence[ToolCall], offered: Sequence[str], rng: random.Random) -> _Mistake | None:
    index = rng.randrange(len(calls))
    call = calls[index]
    key = rng.choice(list(call.arguments))
    value, choices = call.arguments[key], _schema(call.name)["properties"][key].get("enum")
    if choices:
        new = rng.choice([choice for choice in choices if choice != value])
    elif isinstance(value, int):
        new = value + rng.randint(1, 9)
    else:
        found = rng.choice(list(re.finditer(r"\d+|[A-Za-z_]+", value)) or [None])
        if found is None:
            return None
        now = str(int(found[0]) + rng.randint(1, 9)) if found[0].isdecimal() else ""
        new = value[: found.start()] + now + value[found.end() :]
    changed = ToolCall(call.name, {**call.arguments, key: new})
    return _with(calls, index, _text_of(changed)), f"another {key} than is asked for"


def _missing_argument(calls: Sequence[ToolCall], offered: Sequence[str], rng: random.Random) -> _Mistake | None:
    index = rng.randrange(len(calls))
    call = calls[index]
    key = rng.choice(_schema(call.name)["required"])
    left = {name: value for name, value in call.arguments.items() if name != key}
    return _with(calls, index, _text_of(ToolCall(call.name, left))), f"{key} is missing"


def _malformed(calls: Sequence[ToolCall], offered: Sequence[str], rng: random.Random) -> _Mistake | None:
    index = rng.randrange(len(calls))
    text = _text_of(calls[index])
    quotes = [place for place, character in enumerate(text) if character == '"']
    place = rng.choice(quotes)
    damaged = [
        ("the last brace is missing", text[:-1]),
        ("both braces at the end are missing", text[:-2]),
        ("a quotation mark is missing", text[:place] + text[place + 1 :]),
        ("quotation marks are single", text.replace('"', "'")),
        ("a colon is missing", text.replace('": ', '" ', 1)),
        ("it ends in the middle", text[: rng.randint(len(text) // 2, len(text) - 3)]),
    ]
    reason, found = rng.choice([(reason, new) for reason, new in damaged if not _is_json(new)])
    return _with(calls, index, found), f"no JSON: {reason}"


def _is_json(text: str) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def _no_call(calls: Sequence[ToolCall], offered: Sequence[str], rng: random.Random) -> _Mistake | None:
    if len(calls) > 1 and rng.random() < 0.5:
        left = rng.randrange(len(calls))
        return Reply("", (_text_of(calls[left]),)), "only one of the calls"
    text = next(value for value in calls[0].arguments.values() if isinstance(value, str))
    said = ["I cannot do that.", f"The result is {rng.randint(0, 999)}.", "It works.", f"Like this:\n```\n{text}\n```"]
    return Reply(rng.choice(said)), "answers without a call"


def _needless_call(request: str, offered: Sequence[str], rng: random.Random) -> _Mistake:
    name = rng.choice(offered)
    return Reply("", (_text_of(_call_with(name, request)),)), f"calls {name} where nothing has to be called"


# The possible mistakes of a rejected turn where functions have to be called.
CRITERIA: dict[str, Callable[[Sequence[ToolCall], Sequence[str], random.Random], _Mistake | None]] = {
    "tool": _wrong_tool,
    "argument": _wrong_argument,
    "missing_argument": _missing_argument,
    "malformed": _malformed,
    "no_call": _no_call,
}
