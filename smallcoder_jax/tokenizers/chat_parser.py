"""What an assistant wrote, from its ids back to a message: content and function calls.

Only ids tell a special piece from its name written out, so it is ids that are read, one at a time as they come. What a
model did wrong is a value and no exception: it is to be counted, or sent back to it.
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
    "stray_piece",  # a special piece that has no place where it stands
    "stray_text",  # text between or behind calls
    "unclosed_call",  # the turn, or another call, begins or ends inside a call
    "invalid_json",  # a call that is no JSON object with a name, and arguments in a form that `chat.read_call` knows
    "loose_form",  # a call that can be read, and is not just `name` and `arguments`, an object
    "unknown_tool",  # a name that is not on offer
    "missing_argument",
    "unknown_argument",
    "wrong_type",  # also a value that is not in the schema's `enum`
]
# What a score takes as not well-formed. Whoever makes the calls may let "loose_form" pass: the call is there.
MALFORMED: tuple[ErrorKind, ...] = ("stray_piece", "stray_text", "unclosed_call", "invalid_json", "loose_form")


@dataclasses.dataclass(frozen=True)
class CallError:
    """One thing that is wrong. `call` counts from 0 in the order in which calls begin; None: it is in no call."""

    kind: ErrorKind
    call: int | None
    message: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A turn of the assistant. `message` has the calls that could be read, whether or not they fit their schema;
    `ended` is False where the turn was cut off before `<|im_end|>`."""

    message: Message
    errors: tuple[CallError, ...]
    ended: bool


class MessageParser:
    """Reads the ids that follow the header of an assistant's turn. `tools` are the schemas on offer."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]):
        self._token_bytes = tokenizer.token_bytes
        self._pieces = {i: piece for piece, i in tokenizer.specials.items()}
        self._tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._content: list[str] = []
        self._held = ""  # a newline that belongs to the call behind it, if one comes
        self._begun = 0  # calls
        self._raw = bytearray()  # of the call that is open, or behind the last one
        self._state: Literal["content", "call", "behind", "over"] = "content"
        self._calls: list[ToolCall] = []
        self._errors: list[CallError] = []
        self._ended = False

    def feed(self, ids: Iterable[int]) -> str:
        """The content that is certain after these ids; what comes behind the end of the turn is left unread."""
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
        """The message, when no more ids come."""
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
        """Before a call begins or the turn ends: what the state so far leaves behind."""
        if state == "content":
            self._add_content(self._decoder.decode(b"", final=True))
        elif state == "call":
            self._errors.append(CallError("unclosed_call", self._begun - 1, f"no {CALL_END} behind the call"))
        elif self._raw.strip():
            text = self._raw.decode("utf-8", errors="replace").strip()
            self._errors.append(CallError("stray_text", None, f"text behind a call: {text!r}"))
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
    """The message of a whole turn: ids behind its header, with or without `<|im_end|>`."""
    parser = MessageParser(tokenizer, tools)
    parser.feed(ids)
    return parser.finish()


def check_call(call: ToolCall, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[ErrorKind, str]]:
    """What is wrong with a call, given the functions on offer by name.

    Of JSON schema: `type`, `enum`, `properties`, `required`, `additionalProperties: false` and `items`.
    """
    if call.name not in tools:
        return [("unknown_tool", f"{call.name!r} is not on offer; expected one of {', '.join(tools) or 'none'}")]
    return _check_value(call.arguments, tools[call.name].get("parameters", {}), "arguments")


def same_value(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same: 1 and 1.0 are, 1 and true are not; the order of keys does not count."""
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
