"""Conversations in the format of OpenAI's API, in which they are also stored: arguments are a JSON string there.

Reading accepts these variants that data sets use, too: keys that are null, content as a list of text parts, arguments
as an object, calls and responses without ids (then the responses are in the order of the calls), and functions without
the enclosing object. Otherwise reading is strict: whatever deviates is an error that says where, and nothing is
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.chat import (
    ROLES,
    Conversation,
    Message,
    ToolCall,
    check,
    content_text,
    read_call,
    to_json,
)


def to_wire(conversation: Conversation) -> dict[str, Any]:
    """The conversation as `{"messages": [...], "tools": [...]}`. Calls are numbered, and each response names its call.

    Raises UserError for an invalid conversation.
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
    """The conversation of `{"messages": [...], "tools": [...]}`, with the responses put in the order of their calls.

    Raises UserError that names the place of a key that is missing, unknown or of a wrong type, or of a value that is
    not JSON.
    """
    fields = _fields(value, "the conversation", required={"messages": list}, optional={"tools": list})
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(fields.get("tools", [])))
    read = [_message(item, f"messages[{index}]") for index, item in enumerate(fields["messages"])]
    in_order = not any(ids for message, ids in read if message.role == "tool")
    messages: list[Message] = []
    waiting: list[str] = []  # the ids of the calls whose responses have to follow
    responses: dict[str, Message] = {}
    for index, (message, ids) in enumerate(read):
        where = f"messages[{index}]"
        if message.role == "tool":
            if not ids and not in_order:
                raise UserError(
                    f"{where} has no tool_call_id; expected one in each message of the role tool, or in none"
                )
            answers = ids[0] if ids else next((i for i in waiting if i not in responses), "")
            _place(answers, where, waiting, responses)
            responses[answers] = message
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
    conversation = Conversation(tuple(messages), tools)
    check(conversation)
    return conversation


def calls_to_wire(calls: Sequence[ToolCall], *, first: int) -> list[dict[str, Any]]:
    """The calls of one message, with ids numbered from `first`."""
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": to_json(call.arguments, f"the arguments of {call.name}")},
        }
        for number, call in enumerate(calls, first)
    ]


def _tool(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict) and "name" in value and "function" not in value:
        value = {"type": "function", "function": {key: item for key, item in value.items() if key != "type"}}
    tool = _fields(value, where, required={"type": str, "function": dict})
    optional = {"description": str, "parameters": dict, "strict": bool}
    return {**tool, "function": _fields(tool["function"], f"{where}.function", {"name": str}, optional)}


def _message(value: Any, where: str) -> tuple[Message, list[str]]:
    """A message and the ids of its calls. For a response, the id of the call that it answers, or no id."""
    content: Any = (str, list)
    optional = {"content": content, "tool_calls": list, "tool_call_id": str, "name": str}
    fields = _fields(value, where, {"role": str}, optional)
    role, given = fields["role"], fields.get("tool_calls", [])
    if role not in ROLES:
        raise UserError(f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}")
    for key in ("tool_call_id", "name"):  # name: the name of the function
        if key in fields and role != "tool":
            raise UserError(f"{where} has the key {key!r}, which belongs to messages of the role tool")
    if "content" not in fields and not given and role != "tool":
        raise UserError(f"{where} has neither content nor tool_calls")
    calls, ids = [], [fields["tool_call_id"]] if "tool_call_id" in fields else []
    for index, item in enumerate(given):
        call, i = _call(item, f"{where}.tool_calls[{index}]")
        if i in ids:
            raise UserError(f"{where}.tool_calls[{index}].id is {i!r}, as that of a call before it; give each its own")
        calls.append(call)
        ids.append(i)
    return Message(role, content_text(fields.get("content"), f"{where}.content"), tuple(calls)), ids


def _call(value: Any, where: str) -> tuple[ToolCall, str]:
    """A call and its id. For a call without an id, the text of its place in the conversation is used as the id."""
    given = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
    try:
        call, _ = read_call(given)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    i = given.get("id", where)
    if not isinstance(i, str):
        raise UserError(f"{where}.id is {i!r:.80}; expected a string")
    return call, i


def _place(i: str, where: str, waiting: list[str], responses: Mapping[str, Message]) -> None:
    if i not in waiting or i in responses:
        left = [call for call in waiting if call not in responses]
        expected = f"one of {left}" if left else "no response here, as no call is open"
        raise UserError(f"{where}.tool_call_id is {i!r}; expected {expected}")


def _fields(
    value: Any, where: str, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The keys of the object `value` that are not null. Raises UserError for a missing key, any other key, or a wrong
    type."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r:.80}; expected an object")
    fields = {key: item for key, item in value.items() if item is not None}
    known = {**required, **(optional or {})}
    if missing := [key for key in required if key not in fields]:
        raise UserError(f"{where} has no {missing[0]}; expected the keys {', '.join(required)}")
    if unknown := [key for key in fields if key not in known]:
        raise UserError(f"{where} has the key {unknown[0]!r}; expected only {', '.join(known)}")
    for key, item in fields.items():
        if not isinstance(item, known[key]):
            raise UserError(f"{where}.{key} is {item!r:.80}, of type {type(item).__name__}; expected another type")
    return fields
