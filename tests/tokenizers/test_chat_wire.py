"""Conversations to OpenAI's shape and back; what does not fit is refused with its place."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_wire import from_wire, to_wire
from tests.tokenizers.test_chat import CONVERSATIONS, random_conversation

TALK = Conversation(
    (
        Message("user", "x"),
        Message("assistant", "", (ToolCall("run", {"code": "é\n\"'"}), ToolCall("run", {}))),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "", (ToolCall("run", {"n": [1.5, None]}),)),
        Message("tool", "3"),
        Message("assistant", "Done."),
    )
)


def test_the_shape() -> None:
    wire = to_wire(TALK)
    assert wire["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "run", "arguments": '{"code": "é\\n\\"\'"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": "{}"}},
        ],
    }
    assert [message.get("tool_call_id") for message in wire["messages"]] == [
        None, None, "call_0", "call_1", None, "call_2", None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_back_from_json(name: str) -> None:
    assert from_wire(json.loads(json.dumps(to_wire(CONVERSATIONS[name])))) == CONVERSATIONS[name]


def test_random_conversations_come_back() -> None:
    rng = random.Random(11)
    for _ in range(300):
        conversation = random_conversation(rng)
        assert from_wire(json.loads(json.dumps(to_wire(conversation)))) == conversation


def test_responses_are_put_in_the_order_of_their_calls() -> None:
    wire = to_wire(TALK)
    wire["messages"][2], wire["messages"][3] = wire["messages"][3], wire["messages"][2]
    wire["messages"][1]["content"] = None
    assert from_wire(wire) == TALK


def damaged(change: Any) -> dict[str, Any]:
    wire = copy.deepcopy(to_wire(Conversation(TALK.messages, ({"type": "function", "function": {"name": "run"}},))))
    change(wire["messages"], wire)
    return wire


def test_what_data_sets_write_in_other_ways() -> None:
    """Nulls as tables have them, parts of content, calls and responses without ids, arguments as objects."""
    nulls = {"tool_calls": None, "tool_call_id": None, "name": None}
    messages = [
        {**nulls, "role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "\n y"}]},
        {
            **nulls,
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "id": None, "function": {"name": "run", "arguments": {"code": "1"}}},
                {"name": "run", "arguments": None},
                {"function": {"name": "run", "parameters": {"n": 1}}},
                {"name": "run"},
            ],
        },
        {**nulls, "role": "tool", "content": "1", "name": "run"},
        {**nulls, "role": "tool", "content": None},
        {"role": "tool"},
        {"role": "tool", "content": []},
        {**nulls, "role": "assistant", "content": "Done."},
    ]
    tools = [{"name": "run", "description": None, "parameters": {"type": "object"}}, {"type": "function", "name": "f"}]
    calls = tuple(ToolCall("run", arguments) for arguments in ({"code": "1"}, {}, {"n": 1}, {}))
    responses = (Message("tool", "1"), *[Message("tool")] * 3)
    assert from_wire({"messages": messages, "tools": tools}) == Conversation(
        (Message("user", "x\n y"), Message("assistant", "", calls), *responses, Message("assistant", "Done.")),
        (
            {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "f"}},
        ),
    )


def function(messages: list[Any]) -> dict[str, Any]:
    return messages[1]["tool_calls"][0]["function"]


CALL = r"messages\[1\].tool_calls\[0\]: "
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m, w: w.pop("messages"), "the conversation has no messages"),
        (lambda m, w: w.update(model="x"), "the conversation has the key 'model'"),
        (lambda m, w: m.append("x"), r"messages\[7\] is 'x'; expected an object"),
        (lambda m, w: m[0].update(role="judge"), r"messages\[0\].role is 'judge'"),
        (lambda m, w: m[0].update(content=1), r"messages\[0\].content is 1, of type int"),
        (lambda m, w: m[0].update(content=[1]), r"messages\[0\].content\[0\] is 1; expected a part"),
        (
            lambda m, w: m[0].update(content=["x", IMAGE]),
            r"messages\[0\].content\[1\] is .*image_url.*; expected a part",
        ),
        (lambda m, w: m[0].update(content=None), r"messages\[0\] has neither content nor tool_calls"),
        (lambda m, w: m[0].update(name="x"), r"messages\[0\] has the key 'name'"),
        (lambda m, w: function(m).update(arguments='{"a": 1'), CALL + r"the arguments are not valid JSON: .*column 8"),
        (
            lambda m, w: function(m).update(arguments='{"a": 1, "a": 2}'),
            CALL + "the arguments are not valid JSON: the key 'a'",
        ),
        (lambda m, w: function(m).update(arguments="[]"), CALL + "the arguments are a JSON list; expected an object"),
        (
            lambda m, w: function(m).update(parameters={}),
            CALL + "a call is .*; found the keys name, arguments, parameters",
        ),
        (lambda m, w: m[1]["tool_calls"][0].update(id=3), r"messages\[1\].tool_calls\[0\].id is 3; expected a string"),
        (lambda m, w: function(m).pop("name"), CALL + "a call is .*; found the keys arguments"),
        (lambda m, w: m[1]["tool_calls"][1].update(id="call_0"), r"tool_calls\[1\].id is 'call_0', as that"),
        (lambda m, w: m[2].pop("tool_call_id"), r"messages\[2\] has no tool_call_id"),
        (lambda m, w: m[3].update(tool_call_id="call_0"), r"messages\[3\].tool_call_id is 'call_0'; .*'call_1'"),
        (lambda m, w: m.pop(3), r"messages\[3\].role is assistant; expected the response to"),
        (lambda m, w: m.__delitem__(slice(3, None)), r"the last calls are .* only \['call_0'\]"),
        (lambda m, w: m.insert(0, m[2]), r"messages\[0\].tool_call_id is 'call_0'; expected no response here"),
        (lambda m, w: w["tools"][0].pop("function"), r"tools\[0\] has no function"),
        (lambda m, w: w["tools"][0]["function"].update(parameters=[]), r"tools\[0\].function.parameters is \[\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        from_wire(damaged(change))
