"""Conversations as ids: ChatML, with function calls in the form of the Hermes models.

`templates/chat_template.jinja` is the only description of the format. Exports carry it, and it is rendered here too:
everything that people, tools or a model wrote is held back while it is rendered, so that the ids of special pieces come
from the template's own text and from nothing else.

The loss counts what the assistant writes, from behind the header of its turn to `<|im_end|>`, so that stopping is
learned. The header has ids of its own, because a generated turn begins behind it. All other text between two special
pieces is encoded in one go, which gives the ids of the exported tokenizer for every conversation that has no special
piece written out in it, and no answer that begins with a newline.
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
_AROUND_CALL = {"id", "type", "function"}  # keys of OpenAI's API
_PIECES = re.compile("(" + "|".join(map(re.escape, (BOS, IM_START, IM_END, *TOOL_PIECES))) + ")")
# Stands in the rendered template for text that was held back. Only the template's own text is searched for it.
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
    """Messages, and the schemas of the functions on offer: `{"type": "function", "function": {"name", "description",
    "parameters"}}`, where `parameters` is a JSON schema."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as `ids` (int32, BOS first) and, for each, whether the loss counts it (`counted`, bool)."""

    ids: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def template() -> str:
    """The Jinja template."""
    path = resources.files("smallcoder_jax.tokenizers").joinpath("templates", "chat_template.jinja")
    return path.read_text(encoding="utf-8")


def has_chat(tokenizer: Tokenizer) -> bool:
    """Whether turns have ids of their own: a model cannot end its turn with a piece that is several ids."""
    return all(piece in tokenizer.specials for piece in (IM_START, IM_END))


def render(conversation: Conversation, *, reply: bool = False) -> str:
    """The text of a conversation; with `reply`, the header of the assistant's next turn at its end.

    Raises UserError for a conversation that cannot be one (see `check`).
    """
    return "".join(text for text, _ in _parts(conversation, reply))


def encode(conversation: Conversation, tokenizer: Tokenizer, *, reply: bool = False) -> Encoded:
    """The ids of `render`, and which of them the assistant wrote.

    With `reply` they are a prompt: what a model continues with its next turn. Raises UserError for a conversation that
    cannot be one (see `check`) and for a tokenizer without a special piece that it needs.
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
    """Raises UserError, naming the message, for an unknown role, a call outside the assistant's turn, responses that
    are not one to each call, text that is not Unicode, or arguments that are not JSON."""
    waiting = 0
    for index, message in enumerate(conversation.messages):
        where = f"messages[{index}]"
        if message.role not in ROLES:
            raise UserError(f"{where}.role is {message.role!r}; expected one of {', '.join(ROLES)}")
        if message.tool_calls and message.role != "assistant":
            raise UserError(f"{where} calls functions with the role {message.role}; only the assistant can")
        if (message.role == "tool") != (waiting > 0):
            expected = f"{waiting} more of the role tool" if waiting else "a call before a response"
            raise UserError(f"{where}.role is {message.role}, but expected was {expected}: one response to each call")
        waiting = waiting - 1 if waiting else len(message.tool_calls)
        to_json([message.content, [[call.name, call.arguments] for call in message.tool_calls]], where)
    if not conversation.messages:
        raise UserError("a conversation has no messages; expected at least one")
    to_json(list(conversation.tools), "tools")


def to_json(value: Any, where: str) -> str:
    """`value` as JSON. Raises UserError, naming `where`, for what has no JSON or is not valid Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be written as JSON: {error}; expected plain values and valid text") from error
    return text


def from_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, saying where, for what JSON does not allow: also for NaN, for a key
    that is there twice, for half a surrogate pair and for nesting that is too deep."""
    value = parse_json(text, unique_keys=True)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_call(value: Any) -> tuple[ToolCall, str]:
    """The call of a JSON object, and in words how that differs from `{"name": TEXT, "arguments": OBJECT}`; empty where
    it does not.

    Models and data sets also write `parameters`, arguments as a JSON string or none, and the form of OpenAI's API
    around it. Raises ValueError for what is no call in any of these forms.
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
    """What a message says: a text, null, or a list of parts that are texts, which are joined.

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
            "calls, as tokenizer.kind=sentencepiece trains"
        )
    return tokenizer.specials[piece]


def _parts(conversation: Conversation, reply: bool) -> Iterator[tuple[str, bool]]:
    """The rendered text in parts: (text, whether it is the template's own)."""
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
    """The template in the environment that `transformers` gives it, but for its `tojson`, which holds text back."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag that marks for transformers what the assistant writes; here it only holds its content."""

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
