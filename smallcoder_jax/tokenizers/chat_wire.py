"""Conversations in the shape of OpenAI's API, which is also how they are stored: arguments are a JSON string there.

Reading is strict: what does not fit is an error that says where it is, and nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.chat import ROLES, Conversation, Message, ToolCall, check, from_json, to_json


def to_wire(conversation: Conversation) -> dict[str, Any]:
    """`{"messages": [...], "tools": [...]}`; calls are numbered, and responses name the call that they answer.

    Raises UserError for a conversation that cannot be one.
    """
    check(conversation)
    messages: list[dict[str, Any]] = []
    given, answered = 0, 0
    for message in conversation.messages:
        wire: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            wire["tool_call_id"] = f"call_{answered}"
            answered += 1
        if message.tool_calls:
            wire["tool_calls"] = calls_to_wire(message.tool_calls, first=given)
            given += len(message.tool_calls)
        messages.append(wire)
    return {"messages": messages, "tools": list(conversation.tools)}


def from_wire(value: Any) -> Conversation:
    """The conversation of `{"messages": [...], "tools": [...]}`, with responses in the order of their calls.

    Raises UserError, naming the place, for what is missing, of another type, not known, or not JSON.
    """
    fields = _fields(value, "the conversation", required={"messages": list}, optional={"tools": list})
    tools = [
        _fields(tool, f"tools[{index}]", required={"type": str, "function": dict})
        for index, tool in enumerate(fields.get("tools") or [])
    ]
    for index, tool in enumerate(tools):
        _fields(
            tool["function"],
            f"tools[{index}].function",
            required={"name": str},
            optional={"description": str, "parameters": dict, "strict": bool},
        )
    messages: list[Message] = []
    waiting: list[str] = []  # the ids of the calls whose responses come next
    responses: dict[str, Message] = {}
    for index, item in enumerate(fields["messages"]):
        where = f"messages[{index}]"
        message, ids = _message(item, where)
        if message.role == "tool":
            _place(ids[0], where, waiting, responses)
            responses[ids[0]] = message
            if len(responses) == len(waiting):
                messages += [responses[i] for i in waiting]
                waiting, responses = [], {}
            continue
        if waiting:
            raise UserError(f"{where}.role is {message.role}; expected the response to {waiting} before it")
        messages.append(message)
        waiting = ids
    if responses:
        raise UserError(f"the last calls are {waiting}, but only {list(responses)} have a response; give all or none")
    conversation = Conversation(tuple(messages), tuple(tools))
    check(conversation)
    return conversation


def calls_to_wire(calls: Sequence[ToolCall], *, first: int) -> list[dict[str, Any]]:
    """The calls of one message, with ids from `first` on."""
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": to_json(call.arguments, f"the arguments of {call.name}")},
        }
        for number, call in enumerate(calls, first)
    ]


def _message(value: Any, where: str) -> tuple[Message, list[str]]:
    """A message, with the ids of its calls or that of the call it answers."""
    text = (str, type(None))
    fields = _fields(
        value, where, required={"role": str}, optional={"content": text, "tool_calls": list, "tool_call_id": str}
    )
    role, content = fields["role"], fields.get("content")
    if role not in ROLES:
        raise UserError(f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}")
    if ("tool_call_id" in fields) != (role == "tool"):
        raise UserError(f"{where}: tool_call_id belongs to messages of the role tool, and each of them needs one")
    if content is None and not fields.get("tool_calls"):
        raise UserError(f"{where} has neither content nor tool_calls")
    calls, ids = [], [fields["tool_call_id"]] if role == "tool" else []
    for index, item in enumerate(fields.get("tool_calls", [])):
        call, i = _call(item, f"{where}.tool_calls[{index}]")
        if i in ids:
            raise UserError(f"{where}.tool_calls[{index}].id is {i!r}, as that of a call before it; give each its own")
        calls.append(call)
        ids.append(i)
    return Message(role, content or "", tuple(calls)), ids


def _call(value: Any, where: str) -> tuple[ToolCall, str]:
    fields = _fields(value, where, required={"id": str, "type": str, "function": dict})
    function = _fields(fields["function"], f"{where}.function", required={"name": str, "arguments": str})
    try:
        arguments = from_json(function["arguments"])
    except ValueError as error:
        raise UserError(f"{where}.function.arguments is not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{where}.function.arguments is a JSON {type(arguments).__name__}; expected an object")
    return ToolCall(function["name"], arguments), fields["id"]


def _place(i: str, where: str, waiting: list[str], responses: Mapping[str, Message]) -> None:
    if i not in waiting or i in responses:
        left = [call for call in waiting if call not in responses]
        expected = f"one of {left}" if left else "no response here, as no call is open"
        raise UserError(f"{where}.tool_call_id is {i!r}; expected {expected}")


def _fields(
    value: Any, where: str, *, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`value` as an object with these keys and types. A key of OpenAI's that says nothing here may not be there."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r:.80}; expected an object")
    known = {**required, **(optional or {})}
    if missing := [key for key in required if key not in value]:
        raise UserError(f"{where} has no {missing[0]}; expected the keys {', '.join(required)}")
    if unknown := [key for key in value if key not in known]:
        raise UserError(f"{where} has the key {unknown[0]!r}; expected only {', '.join(known)}")
    for key, item in value.items():
        if not isinstance(item, known[key]):
            raise UserError(f"{where}.{key} is {item!r:.80}, of type {type(item).__name__}; expected another type")
    return value
