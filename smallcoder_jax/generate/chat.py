"""The assistant's next turn of a conversation, as a whole or streamed in pieces."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.engine import Completion, FinishReason, Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.text import TextStream
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_parser import CallError, MessageParser
from smallcoder_jax.tokenizers.chat_wire import calls_to_wire


@dataclasses.dataclass(frozen=True)
class Reply:
    """The assistant's answer: its `content`, and the functions that it `calls`. Nothing is executed.

    `content` ends before a stop string and holds no special pieces. `errors` describes what is wrong with the calls; a
    call that could not be parsed is not in `calls`. `finish_reason` is as in `Completion`. `dropped_prompt_tokens` is
    the number of tokens of the oldest turns, which were dropped because they did not fit into the model's context.
    """

    content: str
    calls: tuple[ToolCall, ...]
    errors: tuple[CallError, ...]
    finish_reason: FinishReason
    dropped_prompt_tokens: int

    @property
    def message(self) -> Message:
        """The turn as a message, with which the conversation can be continued."""
        return Message("assistant", self.content, self.calls)

    def to_wire(self) -> dict[str, Any]:
        """The turn in the format of OpenAI's API, to be appended to `messages`."""
        wire: dict[str, Any] = {"role": "assistant", "content": self.content}
        return {**wire, "tool_calls": calls_to_wire(self.calls, first=0)} if self.calls else wire


class ReplyStream:
    """A turn that is being generated.

    Iterating yields the content in pieces of whole characters. `reply` consumes the remaining pieces and returns the
    turn. The constructor raises UserError for a conversation that does not fit, and for more than one sample.
    """

    def __init__(self, generator: Generator, conversation: Conversation, options: SamplingOptions):
        check_tools(conversation.tools)
        self._reader = _Reader(generator.tokenizer, conversation, options)
        prompt = generator.chat_prompt(conversation, options)
        self._ids = generator.stream_ids(prompt, options)
        self._pieces = self._read()
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def reply(self) -> Reply:
        """The whole turn. Raises UserError when generating it was interrupted."""
        collections.deque(self._pieces, maxlen=0)
        if self._reply is None:
            raise UserError("this answer was broken off while it was read; ask for another one")
        return self._reply

    def _read(self) -> Iterator[str]:
        while True:
            try:
                token = next(self._ids)
            except StopIteration as end:
                self._reply, piece = self._reader.finish(end.value)
                if piece:
                    yield piece
                return
            if piece := self._reader.push(token):
                yield piece


def call_lines(calls: Sequence[ToolCall]) -> str:
    """The calls as text for people, one per line: the name, and the arguments as JSON."""
    return "".join(f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}\n" for call in calls)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError, naming the place, for functions of the same name, and for a schema whose keywords have values
    that are not valid JSON schema.
    """
    names = [tool["function"]["name"] for tool in tools]
    for index, tool in enumerate(tools):
        if names.index(names[index]) != index:
            raise UserError(f"tools[{index}] is called {names[index]!r}, like an earlier one; give each its own name")
        _check_schema(tool["function"].get("parameters", {}), f"tools[{index}].function.parameters")


def _check_schema(schema: Any, where: str) -> None:
    if not isinstance(schema, dict):
        raise UserError(f"{where} is {schema!r:.80}; expected a JSON schema, which is an object")
    kinds = {"type": (str, list), "enum": list, "required": list, "properties": dict}
    for key, kind in kinds.items():
        value = schema.get(key)
        names = value if key in ("type", "required") and isinstance(value, list) else ()
        if key in schema and not (isinstance(value, kind) and all(isinstance(name, str) for name in names)):
            raise UserError(f"{where}.{key} is {value!r:.80}; expected a value that JSON schema allows there")
    for name, inner in schema.get("properties", {}).items():
        _check_schema(inner, f"{where}.properties.{name}")
    if "items" in schema:
        _check_schema(schema["items"], f"{where}.items")


def reply_of(
    completion: Completion, tokenizer: Tokenizer, conversation: Conversation, options: SamplingOptions
) -> Reply:
    """Parses a completion of `Generator.chat_prompt` as a turn."""
    reader = _Reader(tokenizer, conversation, options)
    for token in completion.token_ids:
        reader.push(token)
    return reader.finish(completion)[0]


class _Reader:
    """Parses ids into content, which ends before a stop string, and calls."""

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation, options: SamplingOptions):
        self._parser = MessageParser(tokenizer, conversation.tools)
        self._stop = TextStream(options.stop)
        self._parsed = 0  # characters of content that the parser has returned
        self._content = ""

    def push(self, token: int) -> str:
        """The new content that is final after this id."""
        return self._add(self._parser.feed([token]))

    def finish(self, completion: Completion) -> tuple[Reply, str]:
        """The turn, and the content that `push` has not returned."""
        parsed = self._parser.finish()
        rest = self._add(parsed.message.content[self._parsed :])
        self._content += (end := self._stop.finish())
        calls = parsed.message.tool_calls
        reason, dropped = completion.finish_reason, completion.dropped_prompt_tokens
        return Reply(self._content, calls, parsed.errors, reason, dropped), rest + end

    def _add(self, text: str) -> str:
        self._parsed += len(text)
        piece = self._stop.push(text.encode())
        self._content += piece
        return piece
