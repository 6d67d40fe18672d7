"""Conversations as ids: ChatML, with function calls in the format of the Hermes models.

`templates/chat_template.jinja` is the only definition of the format. Exports contain it, and this module renders it
too. While it is rendered, placeholders replace everything that people, tools or a model wrote, so that the ids of
special pieces come only from the template's own text.

The loss counts what the assistant writes, from the end of the header of its turn up to and including `<|im_end|>`, so
that the model learns to stop. The header is encoded separately, because a generated turn begins after it. All other
text between two special pieces is encoded in one call. This gives the same ids as the exported tokenizer for every
conversation in which no special piece is written out and no answer begins with a newline.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import parse_json
from smallcoder_jax.tokenizers.base import BOS, IM_END, IM_START, TOOL_PIECES, Tokenizer

ROLES = ("system", "user", "assistant", "tool")
_HEADER = "assistant\n"
_AROUND_CALL = {"id", "type", "function"}  # keys of the object around a call in OpenAI's API
_PIECES = re.compile("(" + "|".join(map(re.escape, (BOS, IM_START, IM_END, *TOOL_PIECES))) + ")")
# The placeholder for text that was held back while the template was rendered. It is searched for only in the template's
# own text.
_HELD = re.compile("\ue000([0-9]+)\ue001")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One function call. `arguments` holds plain JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `role` is one of `ROLES`; only the assistant calls functions, and each call has one `tool` message as
    its response, in the order of the calls."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and the schemas of the available functions: `{"type": "function", "function": {"name", "description",
    "parameters"}}`, where `parameters` is a JSON schema."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as `ids` (int32, BOS first), and for each id whether the loss counts it (`counted`, bool)."""

    ids: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def template() -> str:
    """The source of the Jinja template."""
    path = resources.files("smallcoder_jax.tokenizers").joinpath("templates", "chat_template.jinja")
    return path.read_text(encoding="utf-8")


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether the pieces around a turn are single ids; otherwise a model cannot end its turn."""
    return all(piece in tokenizer.specials for piece in (IM_START, IM_END))


def render(conversation: Conversation, *, reply: bool = False) -> str:
    """The text of a conversation; with `reply`, it ends with the header of the assistant's next turn.

    Raises UserError for an invalid conversation (see `check`).
    """
    return "".join(text for text, _ in _parts(conversation, reply))


def encode(conversation: Conversation, tokenizer: Tokenizer, *, reply: bool = False) -> Encoded:
    """The ids of the text that `render` returns, and which of them the assistant wrote.

    With `reply` they are a prompt that a model continues with its next turn. Raises UserError for an invalid
    conversation (see `check`), and for a tokenizer without a special piece that the conversation needs.
    """
    ids: list[int] = []
    counted: list[bool] = []
    text, counting, after_start = "", False, False

    def flush() -> None:
        nonlocal text
        found = tokenizer.encode(text) if text else []
        ids.extend(found)
        counted.extend([counting] * len(found))
        text = ""

    for part, own in _parts(conversation, reply):
        for piece in _PIECES.split(part) if own else [part]:
            if own and _PIECES.fullmatch(piece):
                flush()
                ids.append(_id_of(piece, tokenizer))
                counted.append(counting)
                counting = counting and piece != IM_END
                after_start = piece == IM_START
            elif own and after_start and piece.startswith(_HEADER):
                text = _HEADER
                flush()
                text, counting, after_start = piece.removeprefix(_HEADER), True, False
            else:
                text += piece
    flush()
    return Encoded(np.array(ids, np.int32), np.array(counted, bool))


def check(conversation: Conversation) -> None:
    """Raises UserError, naming the message, for an unknown role, a call outside the assistant's turn, a number of
    responses other than one per call, text that is not valid Unicode, or arguments that are not JSON."""
    waiting = 0
    for index, message in enumerate(conversation.messages):
        where = f"messages[{index}]"
        if message.role not in ROLES:
            raise UserError(f"{where}.role is {message.role!r}; expected one of {', '.join(ROLES)}")
        if message.tool_calls and message.role != "assistant":
            raise UserError(f"{where} calls functions with the role {message.role}; only the assistant can")
        if (message.role == "tool") != (waiting > 0):
            expected = f"{waiting} more of the role tool" if waiting else "a call before a response"
            raise UserError(f"{where}.role is {message.role}; expected {expected}, as each call has one response")
        waiting = waiting - 1 if waiting else len(message.tool_calls)
        to_json([message.content, [[call.name, call.arguments] for call in message.tool_calls]], where)
    if not conversation.messages:
        raise UserError("a conversation has no messages; expected at least one")
    to_json(list(conversation.tools), "tools")


def to_json(value: Any, where: str) -> str:
    """`value` as JSON. Raises UserError, naming `where`, for a value that JSON cannot express or that is not valid
    Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be written as JSON: {error}; expected plain values and valid text") from error
    return text


def from_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError that says where the text is invalid. NaN, a key that an object holds
    twice, half a surrogate pair and nesting that is too deep are invalid too."""
    value = parse_json(text, unique_keys=True)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_call(value: Any) -> tuple[ToolCall, str]:
    """The call that a JSON object describes, and in words how the object deviates from `{"name": TEXT, "arguments":
    OBJECT}` ("" where it does not).

    It also accepts other forms that models and data sets use: `parameters` as the key, arguments as a JSON string or
    none at all, and the enclosing object of OpenAI's API. Raises ValueError for a value that is a call in none of these
    forms.
    """
    strict = isinstance(value, dict) and set(value) == {"name", "arguments"} and isinstance(value["arguments"], dict)
    notes = []
    if isinstance(value, dict) and isinstance(value.get("function"), dict) and value.keys() <= _AROUND_CALL:
        value, notes = value["function"], ["is within a function"]
    given = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if set(given) not in ({"name"}, {"name", "arguments"}, {"name", "parameters"}):
        found = f"the keys {', '.join(given) or 'none'}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"a call is a JSON object with the keys name and arguments; found {found}")
    arguments = given.get("arguments", given.get("parameters", ""))
    if isinstance(arguments, str):
        notes.append("has its arguments as a string" if arguments else "has no arguments")
        arguments = _arguments_of(arguments) if arguments else {}
    if not isinstance(given["name"], str):
        raise ValueError(f"name is {given['name']!r:.80}; it has to be a string")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments are a JSON {type(arguments).__name__}; expected an object")
    if "parameters" in given:
        notes.append("has parameters for arguments")
    return ToolCall(given["name"], arguments), "" if strict else " and ".join(notes) or "has keys that are null"


def _arguments_of(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"the arguments are not valid JSON: {error}") from error


def content_text(value: Any, where: str) -> str:
    """The text of a message's content `value`, which is a text, null, or a list of text parts, which are joined.

    Raises UserError, naming `where`, for anything else, such as a part that is an image.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise UserError(f"{where} is {value!r:.80}, of type {type(value).__name__}; expected text or a list of parts")
    texts = []
    for index, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise UserError(f'{where}[{index}] is {part!r:.80}; expected a part {{"type": "text", "text": TEXT}}')
        texts.append(text)
    return "".join(texts)


def _id_of(piece: str, tokenizer: Tokenizer) -> int:
    if piece not in tokenizer.specials:
        raise UserError(
            f"the tokenizer has no piece {piece}, which this conversation needs; use one with pieces for turns and "
            "calls, as tokenizer.kind=sentencepiece trains, or tokenizer.kind=bytes_tools for a model of bytes, from "
            "its first stage on"
        )
    return tokenizer.specials[piece]


def _parts(conversation: Conversation, reply: bool) -> Iterator[tuple[str, bool]]:
    """The rendered text in parts: (text, whether it is the template's own text)."""
    check(conversation)
    held: list[str] = []

    def hold(text: str) -> str:
        held.append(text)
        return f"\ue000{len(held) - 1}\ue001" if text else ""

    def hold_json(value: Any) -> str:
        return hold(json.dumps(value, ensure_ascii=False))

    messages = [
        {
            "role": message.role,
            "content": hold(message.content),
            "tool_calls": [dataclasses.asdict(call) for call in message.tool_calls],
        }
        for message in conversation.messages
    ]
    text = _compiled().render(
        messages=messages,
        tools=list(conversation.tools),
        bos_token=BOS,
        add_generation_prompt=reply,
        hold_json=hold_json,
    )
    for index, part in enumerate(_HELD.split(text)):
        if index % 2:
            yield held[int(part)], False
        elif part:
            yield part, True


@functools.cache
def _compiled() -> Any:
    """The template, compiled in the same environment as in `transformers`, except that `tojson` inserts
    placeholders."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag by which transformers finds what the assistant wrote. Here only its content is rendered."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    @jinja2.pass_context
    def tojson(context: jinja2.runtime.Context, value: Any) -> str:
        return context["hold_json"](value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    return environment.from_string(template())
