"""Parses the ids that an assistant generated into a message: content and function calls.

The parser reads ids, one at a time as they are generated, because only ids distinguish a special piece from its name
written out. A model's mistakes are returned as values, not raised, so that they can be counted or sent back to it.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from smallcoder_jax.tokenizers.base import EOS, IM_END, TOOL_PIECES, Tokenizer
from smallcoder_jax.tokenizers.chat import Message, ToolCall, from_json, read_call

CALL_START, CALL_END = TOOL_PIECES[:2]

ErrorKind = Literal[
    "stray_piece",  # a special piece that is not allowed at its position
    "stray_text",  # text between or after calls
    "unclosed_call",  # the turn ends, or another call begins, inside a call
    "invalid_json",  # a call that is not a JSON object in one of the forms that `chat.read_call` accepts
    "loose_form",  # a call that can be read, but is not an object with just `name` and `arguments`, an object
    "unknown_tool",  # a name that is not among the available functions
    "missing_argument",
    "unknown_argument",
    "wrong_type",  # also a value that is not in the schema's `enum`
]
# The errors by which a score counts a turn as malformed. Code that executes the calls may ignore "loose_form", because
# the call could be read.
MALFORMED: tuple[ErrorKind, ...] = ("stray_piece", "stray_text", "unclosed_call", "invalid_json", "loose_form")


@dataclasses.dataclass(frozen=True)
class CallError:
    """One mistake. `call` is the index of the call that contains it, from 0 in the order in which calls begin, or None
    outside calls."""

    kind: ErrorKind
    call: int | None
    message: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A turn of the assistant. `message` has the calls that could be read, whether or not they match their schema.
    `ended` is False where the turn was cut off before `<|im_end|>`."""

    message: Message
    errors: tuple[CallError, ...]
    ended: bool


class MessageParser:
    """Parses the ids that follow the header of an assistant's turn. `tools`: the schemas of the available functions."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]):
        self._token_bytes = tokenizer.token_bytes
        self._pieces = {i: piece for piece, i in tokenizer.specials.items()}
        self._tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._content: list[str] = []
        self._held = ""  # a newline that belongs to the call after it, if one follows
        self._begun = 0  # number of calls that have begun
        self._raw = bytearray()  # the bytes of the open call, or of the text after the last call
        self._state: Literal["content", "call", "behind", "over"] = "content"
        self._calls: list[ToolCall] = []
        self._errors: list[CallError] = []
        self._ended = False

    def feed(self, ids: Iterable[int]) -> str:
        """Reads more ids and returns the content that they complete. Ids after the end of the turn are ignored."""
        before = len(self._content)
        for i in ids:
            if self._state == "over":
                break
            piece = self._pieces.get(i)
            if piece is not None:
                self._read_piece(piece)
            elif self._state == "content":
                self._add_content(self._decoder.decode(self._token_bytes[i]))
            else:
                self._raw += self._token_bytes[i]
        return "".join(self._content[before:])

    def finish(self) -> Parsed:
        """The parsed turn. Call it after the last ids."""
        if self._state != "over":
            self._end(ended=False)
        message = Message("assistant", "".join(self._content), tuple(self._calls))
        return Parsed(message, tuple(self._errors), self._ended)

    def _add_content(self, text: str) -> None:
        text, self._held = self._held + text, ""
        if text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        if text:
            self._content.append(text)

    def _read_piece(self, piece: str) -> None:
        if piece in (IM_END, EOS):
            self._end(ended=piece == IM_END)
        elif piece == CALL_START:
            self._leave(self._state)
            self._held = ""
            self._begun += 1
            self._state = "call"
        elif piece == CALL_END and self._state == "call":
            self._read_call()
            self._state = "behind"
        else:
            in_call = self._begun - 1 if self._state == "call" else None
            self._errors.append(CallError("stray_piece", in_call, f"{piece} has no place here"))

    def _end(self, *, ended: bool) -> None:
        self._leave(self._state)
        if self._held:
            self._content.append(self._held)
        self._state, self._ended = "over", ended

    def _leave(self, state: str) -> None:
        """Completes `state` before a call begins or the turn ends: flushes content, and records an unclosed call or
        stray text."""
        if state == "content":
            self._add_content(self._decoder.decode(b"", final=True))
        elif state == "call":
            self._errors.append(CallError("unclosed_call", self._begun - 1, f"no {CALL_END} after the call"))
        elif self._raw.strip():
            text = self._raw.decode("utf-8", errors="replace").strip()
            self._errors.append(CallError("stray_text", None, f"text after a call: {text!r}"))
        self._raw.clear()

    def _read_call(self) -> None:
        index = self._begun - 1
        try:
            call, note = read_call(from_json(self._raw.decode("utf-8")))
        except ValueError as error:  # UnicodeDecodeError is one
            self._errors.append(CallError("invalid_json", index, str(error)))
        else:
            self._calls.append(call)
            if note:
                text = f"the call {note}; expected the keys name and arguments, an object"
                self._errors.append(CallError("loose_form", index, text))
            self._errors += [CallError(kind, index, text) for kind, text in check_call(call, self._tools)]
        self._raw.clear()


def parse(ids: Iterable[int], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """Parses a whole turn: the ids after its header, with or without `<|im_end|>`."""
    parser = MessageParser(tokenizer, tools)
    parser.feed(ids)
    return parser.finish()


def check_call(call: ToolCall, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[ErrorKind, str]]:
    """The mistakes in a call, given the available functions by name.

    Supports these keywords of JSON schema: `type`, `enum`, `properties`, `required`, `additionalProperties: false` and
    `items`.
    """
    if call.name not in tools:
        return [("unknown_tool", f"{call.name!r} is not on offer; expected one of {', '.join(tools) or 'none'}")]
    return _check_value(call.arguments, tools[call.name].get("parameters", {}), "arguments")


def same_value(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 and 1.0 are, 1 and true are not. The order of keys does not matter."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _check_value(value: Any, schema: Mapping[str, Any], where: str) -> list[tuple[ErrorKind, str]]:
    wanted = schema.get("type", [])
    types = [wanted] if isinstance(wanted, str) else wanted
    if types and not any(_is_type(value, name) for name in types):
        return [("wrong_type", f"{where} is {value!r}; expected {' or '.join(types)}")]
    if "enum" in schema and not any(same_value(value, choice) for choice in schema["enum"]):
        return [("wrong_type", f"{where} is {value!r}; expected one of {schema['enum']}")]
    found: list[tuple[ErrorKind, str]] = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in schema.get("required", []):
            if key not in value:
                found.append(("missing_argument", f"{where} has no {key}"))
        for key, item in value.items():
            if key in properties:
                found += _check_value(item, properties[key], f"{where}.{key}")
            elif schema.get("additionalProperties") is False:
                found.append(("unknown_argument", f"{where} has {key!r}, which the function does not take"))
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += _check_value(item, schema["items"], f"{where}[{index}]")
    return found


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and (isinstance(value, int) or value.is_integer()))
    kinds = {"string": str, "array": list, "object": dict, "null": type(None)}
    return name in kinds and isinstance(value, kinds[name])
