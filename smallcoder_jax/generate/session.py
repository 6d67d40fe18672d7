"""A conversation with a code model at a terminal: a prompt in, its completion out as it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TextIO

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions

HELP = """\
Type the start of some code; the model goes on. A line that ends with \\ is continued on the next one.
  /temp X    temperature, 0 is greedy
  /topk N    choose among the N likeliest tokens, 0 is off
  /topp X    choose among the likeliest tokens that add up to X, 1 is off
  /max N     tokens per completion
  /greedy    always the likeliest token
  /sample    back to sampling, at the last temperature
  /help      this text
  /quit      the end, as Ctrl-D and Ctrl-C are; Ctrl-C during a completion stops only that
"""

# Command to the option that it sets, and how its value is read.
SETTERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "/temp": ("temperature", float),
    "/topk": ("top_k", int),
    "/topp": ("top_p", float),
    "/max": ("max_tokens", int),
}
COMMANDS = [*SETTERS, "/greedy", "/sample", "/help", "/quit"]


class Session:
    """Reads lines with `read` (which raises EOFError at the end, as `input` does) and writes to `output`.

    Every completion has its own seed, counted up from that of `options`, so that the same prompt again gives another
    text and the whole session can be repeated.
    """

    def __init__(self, generator: Generator, options: SamplingOptions, read: Callable[[str], str], output: TextIO):
        self.options = options
        self._generator = generator
        self._read = read
        self._output = output
        self._sample_temperature = options.temperature or SamplingOptions.temperature

    def run(self) -> None:
        """Serves until /quit, the end of the input or Ctrl-C."""
        self._write("/help lists the commands\n")
        try:
            while (text := self._read_prompt()) != "/quit":
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._complete(text)
        except (EOFError, KeyboardInterrupt):
            self._write("\n")

    def _read_prompt(self) -> str:
        lines = [self._read("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(". "))
        return "\n".join(lines) if len(lines) > 1 else lines[0].rstrip()

    def _command(self, text: str) -> None:
        name, *values = text.split()
        try:
            if name in SETTERS:
                self._set(name, values)
            elif name == "/greedy":
                self._change(temperature=0.0)
            elif name == "/sample":
                self._change(temperature=self._sample_temperature)
            elif name == "/help":
                self._write(HELP)
            else:
                self._write(f"unknown command {name}; {nearest(name, COMMANDS)}\n")
        except UserError as error:
            self._write(f"error: {error}\n")

    def _set(self, name: str, values: list[str]) -> None:
        option, parse = SETTERS[name]
        try:
            (value,) = map(parse, values)
        except ValueError as error:
            given = " ".join(values) or "nothing"
            raise UserError(f"{name} takes one number, got {given}; for example {name} 1") from error
        self._change(**{option: value})

    def _change(self, **changes: Any) -> None:
        self.options = dataclasses.replace(self.options, **changes)
        self._sample_temperature = self.options.temperature or self._sample_temperature
        self._write("".join(f"{name} = {value}\n" for name, value in changes.items()))

    def _complete(self, text: str) -> None:
        try:
            for piece in self._generator.stream(text, self.options):
                self._write(piece)
        except KeyboardInterrupt:
            pass
        except UserError as error:
            self._write(f"error: {error}")
        self._write("\n")
        self.options = dataclasses.replace(self.options, seed=(self.options.seed + 1) % 2**32)

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()
