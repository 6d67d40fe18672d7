"""An interactive terminal session with a model, which completes code or holds a conversation. Text is streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from smallcoder_jax.base.display import one_line, say, show
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.generate.chat import Reply, ReplyStream, call_lines
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_parser import check_call

_OPTIONS_HELP = """\
  /temp X       temperature, 0 is greedy
  /topk N       choose among the N most probable tokens, 0 is off
  /topp X       choose among the most probable tokens whose probabilities add up to X, 1 is off
  /max N        tokens per answer
  /greedy       always the most probable token
  /sample       back to sampling, at the last temperature
  /help         this text
  /quit         end the session, as Ctrl-D and Ctrl-C do; Ctrl-C during an answer stops only the answer
"""
_CONTINUED = "A line that ends with \\ is continued on the next one."

# Command -> the option that it sets, and the function that parses its value.
SETTERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "/temp": ("temperature", float),
    "/topk": ("top_k", int),
    "/topp": ("top_p", float),
    "/max": ("max_tokens", int),
}
MOST_ROUNDS = 8  # of executed calls, before the user is asked again


class Session:
    """Completes code.

    Lines are read with `read`, which raises EOFError at the end, as `input` does. The model's text goes to `output`,
    everything else to `log`. Every answer has its own seed, counted up from `options.seed`, so that repeating a prompt
    gives another text but the whole session can be reproduced.
    """

    commands: tuple[str, ...] = (*SETTERS, "/greedy", "/sample", "/help", "/quit")
    help = f"Type the start of some code; the model continues it. {_CONTINUED}\n{_OPTIONS_HELP}"

    def __init__(
        self, generator: Generator, options: SamplingOptions, read: Callable[[str], str], output: TextIO, log: TextIO
    ):
        self.options = options
        self._generator = generator
        self._read = read
        self._output, self._log = output, log
        self._sample_temperature = options.temperature or SamplingOptions.temperature

    def run(self) -> None:
        """Runs until /quit, the end of the input or Ctrl-C."""
        self._note("/help lists the commands")
        try:
            while (text := self._read_text("> ")) != "/quit":
                try:
                    if text.startswith("/"):
                        self._command(*text.split(maxsplit=1))
                    elif text:
                        self._answer(text)
                except UserError as error:
                    self._note(f"error: {error}")
        except (EOFError, KeyboardInterrupt):
            self._note("")

    def _read_text(self, prompt: str) -> str:
        lines = [self._read(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(". "))
        return "\n".join(lines) if len(lines) > 1 else lines[0].rstrip()

    def _command(self, name: str, value: str = "") -> None:
        if name in SETTERS:
            self._set(name, value)
        elif name == "/greedy":
            self._change(temperature=0.0)
        elif name == "/sample":
            self._change(temperature=self._sample_temperature)
        elif name == "/help":
            self._note(self.help.rstrip("\n"))
        else:
            raise UserError(f"unknown command {name}; {nearest(name, list(self.commands))}")

    def _set(self, name: str, given: str) -> None:
        option, parse = SETTERS[name]
        try:
            value = parse(given)
        except ValueError as error:
            raise UserError(f"{name} takes one number, got {given or 'nothing'}; for example {name} 1") from error
        self._change(**{option: value})

    def _change(self, **changes: Any) -> None:
        self.options = dataclasses.replace(self.options, **changes)
        self._sample_temperature = self.options.temperature or self._sample_temperature
        self._note("\n".join(f"{name} = {value}" for name, value in changes.items()))

    def _answer(self, text: str) -> None:
        self._stream(self._generator.stream(text, self.options))

    def _stream(self, pieces: Iterable[str]) -> tuple[str, bool]:
        """Shows pieces as they arrive; returns the text, and whether it is complete (not stopped by Ctrl-C)."""
        written: list[str] = []
        try:
            for piece in pieces:
                show(piece, self._output)
                written.append(piece)
            return "".join(written), True
        except KeyboardInterrupt:
            return "".join(written), False
        finally:
            if written:
                show("\n", self._output)
            self.options = dataclasses.replace(self.options, seed=(self.options.seed + 1) % 2**32)

    def _note(self, text: str) -> None:
        say(text, self._log)


class ChatSession(Session):
    """Holds a conversation.

    `tools` are the functions that the model may call. `respond` executes a call that fits its schema; if it is None,
    the user types the response. A turn becomes part of the conversation when it is finished, and so does an answer that
    Ctrl-C cut short. A turn that ended in an error, or whose calls got no response, does not.
    """

    commands = (*Session.commands, "/system", "/reset")
    help = f"""\
Type a message; the model answers. {_CONTINUED}
To send a line that begins with /, put a space before it.
  /system TEXT  set the system message; without TEXT, remove it
  /reset        forget what was said; the system message stays
{_OPTIONS_HELP}"""

    def __init__(
        self,
        generator: Generator,
        options: SamplingOptions,
        read: Callable[[str], str],
        output: TextIO,
        log: TextIO,
        *,
        system: str = "",
        tools: Sequence[dict[str, Any]] = (),
        respond: Callable[[ToolCall], str] | None = None,
    ):
        # A long conversation outgrows the context.
        super().__init__(generator, dataclasses.replace(options, truncate_prompt=True), read, output, log)
        self.system = system
        self.messages: tuple[Message, ...] = ()
        self._tools, self._respond = tuple(tools), respond

    def run(self) -> None:
        """Runs as `Session.run` does. Raises UserError at once when no message could be answered."""
        self._generator.chat_prompt(self._conversation([Message("user", "")]), self.options)
        super().run()

    def _command(self, name: str, value: str = "") -> None:
        if name == "/system":
            self.system = value
            self._note("the system message is set" if value else "there is no system message")
        elif name == "/reset":
            self.messages = ()
            self._note("a new conversation begins")
        else:
            super()._command(name, value)

    def _answer(self, text: str) -> None:
        turn = [Message("user", text.removeprefix(" ") if text.startswith(" /") else text)]
        try:
            for _ in range(MOST_ROUNDS):
                stream = ReplyStream(self._generator, self._conversation(turn), self.options)
                written, whole = self._stream(stream)
                if not whole and not written:
                    raise KeyboardInterrupt
                if not whole:
                    turn.append(Message("assistant", written))
                    break
                reply = stream.reply()
                self._note_reply(reply)
                turn.append(reply.message)
                if not reply.calls:
                    break
                turn += [Message("tool", self._response(call)) for call in reply.calls]
            else:
                self._note(f"[{MOST_ROUNDS} rounds of calls; what should be done next?]")
        except KeyboardInterrupt:
            self._note("\n[the turn is left out of the conversation]")
            return
        self.messages += tuple(turn)

    def _conversation(self, turn: Sequence[Message]) -> Conversation:
        system = (Message("system", self.system),) if self.system else ()
        return Conversation((*system, *self.messages, *turn), self._tools)

    def _note_reply(self, reply: Reply) -> None:
        show(call_lines(reply.calls), self._output)
        for error in reply.errors:
            self._note(f"[{error.kind}: {error.message}]")
        if reply.finish_reason == "length":
            self._note(f"[cut off after {self.options.max_tokens} tokens; /max allows more]")
        if reply.dropped_prompt_tokens:
            self._note(f"[{reply.dropped_prompt_tokens} tokens of the oldest turns did not fit and were left out]")

    def _response(self, call: ToolCall) -> str:
        if self._respond is None:
            return self._read_text(f"response of {one_line(call.name)}> ")
        wrong = check_call(call, {tool["function"]["name"]: tool["function"] for tool in self._tools})
        response = f"error: {'; '.join(text for _, text in wrong)}" if wrong else self._respond(call)
        self._note(response)
        return response
