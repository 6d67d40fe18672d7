"""Completes code with a trained model, or talks with one that was trained on conversations.

    python -m tools.generate --checkpoint runs/nano --prompt "def fibonacci(n):"
    python -m tools.generate --checkpoint runs/nano/export --file app.py --line 12
    python -m tools.generate --checkpoint runs/nano --interactive
    python -m tools.generate --checkpoint runs/tools --chat --tools execute_python,run_tests

The model's text goes to stdout, everything else to stderr. On a terminal, control characters are shown as escapes;
files, pipes and JSON receive the exact text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import say, show
from smallcoder_jax.base.errors import UserError, run_cli
from smallcoder_jax.base.files import MAX_RECORD_BYTES, parse_json, read_json, read_text, reason
from smallcoder_jax.config import nearest
from smallcoder_jax.generate.chat import Reply, call_lines, check_tools, reply_of
from smallcoder_jax.generate.engine import Completion, Generator
from smallcoder_jax.generate.prompts import Prompt
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.session import ChatSession, Session
from smallcoder_jax.report.page import learned_turns
from smallcoder_jax.tokenizers.chat import Conversation, Message, check
from smallcoder_jax.tokenizers.chat_wire import calls_to_wire, from_wire
from smallcoder_jax.toolbox.execute import respond
from smallcoder_jax.toolbox.functions import TOOLS

ONE_A_LINE = ("", ".txt")  # suffixes of files with one prompt per line; other files, except .jsonl, are one prompt


def main(argv: list[str] | None = None) -> int | None:
    """Parses the flags, loads the model and completes. Raises UserError on bad input."""
    args = build_parser().parse_args(argv)
    job = read_job(args)
    import smallcoder_jax

    model = smallcoder_jax.load(args.checkpoint, step=args.step)
    if job.chat and "config" in model.info and not learned_turns(model.info["config"]):  # an export does not record it
        say("the last stage of this model did not train on conversations, so it may not answer", sys.stderr)
    set_encodings()
    job.run(model.generator, read_line, sys.stdout, sys.stderr)


def set_encodings() -> None:
    """Makes files and pipes UTF-8, whatever the locale; a terminal shows a question mark for what it cannot display."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def read_line(prompt: str) -> str:
    """A line of the standard input; `prompt` is shown on a terminal only. Raises EOFError at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  (gives `input` its editing, and a history that ends with the session)
        return input(prompt)
    if sys.stdin.isatty():
        show(prompt, sys.stderr)
    line = sys.stdin.readline(MAX_RECORD_BYTES)
    if not line:
        raise EOFError
    if len(line) == MAX_RECORD_BYTES:
        raise UserError(f"a line of the standard input has {MAX_RECORD_BYTES:,} characters or more; give shorter ones")
    return line.removesuffix("\n")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = ArgumentParser(
        prog="python -m tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = SamplingOptions()
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder or an export folder")
    parser.add_argument("--step", default=None, help="checkpoint of a run: a step number or 'best', the default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    what.add_argument(
        "--prompt-file",
        help="prompts.txt: one prompt per line; prompts.jsonl: one JSON string per line; any other file, such as "
        "code.py, and '-', the standard input, is one prompt",
    )
    what.add_argument("--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="write the text between the two texts")
    what.add_argument("--file", type=Path, help="write text to insert into this file, at the start of --line")
    what.add_argument("--interactive", action="store_true", help="complete what is typed; /help lists the commands")
    parser.add_argument("--line", type=int, help="line of --file, counted from 1; one past the last appends")
    parser.add_argument(
        "--chat", action="store_true", help="talk with the model; each prompt is a message, answered separately"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    parser.add_argument(
        "--tools",
        metavar="FILE|NAMES",
        help="functions that --chat offers: a JSON list of schemas, whose calls are shown and not executed; or, "
        f"separated by commas, some of {', '.join(TOOLS)}, which run in the sandbox",
    )
    records = parser.add_mutually_exclusive_group()
    records.add_argument("--json", action="store_true", help="print one JSON object per completion")
    records.add_argument("--output-file", type=Path, help="write completions here, one JSON object per line")
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="0 is greedy; default: %(default)s"
    )
    parser.add_argument("--top-k", type=int, default=default.top_k, help="0 is off; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=default.top_p, help="1 is off; default: %(default)s")
    parser.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="1 is off; default: %(default)s"
    )
    parser.add_argument("--num-samples", type=int, default=default.num_samples, help="per prompt; default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    parser.add_argument("--batch-size", type=int, default=8, help="rows decoded together; default: %(default)s")
    parser.add_argument("--truncate", action="store_true", help="cut a prompt that is too long instead of refusing it")
    return parser


@dataclasses.dataclass(frozen=True)
class Chat:
    """The beginning of a conversation. `executed`: the tools are built in, and their calls run in the sandbox."""

    system: str
    tools: tuple[dict[str, Any], ...]
    executed: bool

    def ask(self, text: str) -> Conversation:
        """The conversation that begins with this message of the user."""
        system = (Message("system", self.system),) if self.system else ()
        return Conversation((*system, Message("user", text)), self.tools)


@dataclasses.dataclass(frozen=True)
class Job:
    """The work that the flags request, read and checked before the model is loaded."""

    options: SamplingOptions
    batch_size: int
    prompts: tuple[str, ...] = ()
    around: tuple[str, str] | None = None  # prefix and suffix of the text to fill in
    interactive: bool = False
    chat: Chat | None = None
    json: bool = False
    output_file: Path | None = None

    def run(self, generator: Generator, read: Callable[[str], str], output: TextIO, log: TextIO) -> None:
        """Completes with `generator`; an interactive session gets its lines from `read`."""
        if self.interactive:
            return self._session(generator, read, output, log).run()
        prompts: Sequence[str | Prompt] = self.prompts
        if self.around:
            prompts = [generator.fim_prompt(*self.around, self.options)]
        elif self.chat:
            prompts = [generator.chat_prompt(self.chat.ask(prompt), self.options) for prompt in self.prompts]
        started = time.perf_counter()
        completions = generator.generate(prompts, self.options, self.batch_size)
        seconds = time.perf_counter() - started
        for number, completion in enumerate(completions[:: self.options.num_samples], start=1):
            if completion.dropped_prompt_tokens:
                say(
                    f"prompt {number}: {completion.dropped_prompt_tokens} tokens did not fit into the model's context "
                    f"and were left out; {completion.prompt_tokens} were read",
                    log,
                )
        self._write(generator, completions, output, log)
        tokens = sum(len(completion.token_ids) for completion in completions)
        say(f"{tokens} tokens in {seconds:.1f} s, compilation and prompts included", log)

    def _session(self, generator: Generator, read: Callable[[str], str], output: TextIO, log: TextIO) -> Session:
        if self.chat is None:
            return Session(generator, self.options, read, output, log)
        return ChatSession(
            generator,
            self.options,
            read,
            output,
            log,
            system=self.chat.system,
            tools=self.chat.tools,
            respond=respond if self.chat.executed else None,
        )

    def _write(self, generator: Generator, completions: list[Completion], output: TextIO, log: TextIO) -> None:
        replies: list[Reply | None] = [None] * len(completions)
        if self.chat:
            asked = self.chat.ask("")  # only the offered functions matter here
            replies = [reply_of(completion, generator.tokenizer, asked, self.options) for completion in completions]
        if self.json or self.output_file:
            lines = [json.dumps(self._record(i, completions[i], replies[i])) + "\n" for i in range(len(completions))]
            if self.output_file is None:
                output.writelines(lines)
                return
            try:
                self.output_file.write_text("".join(lines), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--output-file {self.output_file} cannot be written ({reason(error)})") from error
            return
        for i, (completion, reply) in enumerate(zip(completions, replies, strict=True)):
            name = "prompt {}, sample {}".format(*(number + 1 for number in divmod(i, self.options.num_samples)))
            if len(completions) > 1:
                show(f"=== {name} ===\n", output)
            # A middle or an answer is shown alone, a continuation together with its prompt.
            text = completion.text if self.around else completion.prompt + completion.text
            if reply:
                text = reply.content + ("\n" if reply.content and reply.calls else "") + call_lines(reply.calls)
                for error in reply.errors:
                    say(f"{name}: {error.kind}: {error.message}", log)
            show(text if text.endswith("\n") else text + "\n", output)

    def _record(self, index: int, completion: Completion, reply: Reply | None) -> dict[str, Any]:
        """One line of JSON output."""
        prompt, sample = divmod(index, self.options.num_samples)
        found: dict[str, Any] = {"prompt": completion.prompt, "sample": sample, "text": completion.text}
        if reply:
            found |= {
                "prompt": self.prompts[prompt],
                "text": reply.content,
                "tool_calls": calls_to_wire(reply.calls, first=0),
                "errors": [f"{error.kind}: {error.message}" for error in reply.errors],
            }
        return {
            **found,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
            "tokens_per_second": round(completion.tokens_per_second, 1),
            "seed": self.options.seed,
        }


def read_job(args: argparse.Namespace) -> Job:
    """Checks the flags and reads the files that they name. Raises UserError."""
    given = [args.prompt, args.prompt_file, args.fim, args.file]
    interactive = args.interactive or (args.chat and not any(given))
    if not interactive and not any(given):
        raise UserError(
            "there is nothing to complete; give --prompt, --prompt-file, --fim, --file, --interactive or --chat"
        )
    if (args.file is None) != (args.line is None):
        raise UserError("--file and --line go together: the file to complete and the line to complete it at")
    if args.chat and (args.fim or args.file):
        raise UserError("--chat answers messages; --fim and --file fill in code: leave one of them out")
    if (args.system is not None or args.tools is not None) and not args.chat:
        raise UserError("--system and --tools are what a conversation begins with; add --chat")
    if interactive and (args.output_file or args.json or args.num_samples != 1):
        raise UserError(
            "--interactive and --chat without prompts answer on the terminal, once per prompt; leave --output-file, "
            "--json and --num-samples out"
        )
    if args.output_file:
        check_output(args.output_file)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    options = SamplingOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        num_samples=args.num_samples,
        truncate_prompt=args.truncate or args.file is not None,  # of a whole file, only the text near the line matters
    )
    prompts: tuple[str, ...] = tuple(args.prompt or ())
    around: tuple[str, str] | None = tuple(args.fim) if args.fim else None
    if args.prompt_file:
        prompts = read_prompts(args.prompt_file)
    if args.file:
        around = split_file(args.file, args.line)
    chat = read_chat(args.system or "", args.tools or "") if args.chat else None
    return Job(options, args.batch_size, prompts, around, interactive, chat, args.json, args.output_file)


def check_output(path: Path) -> None:
    """Raises UserError, before any work is done, if the file could not be written."""
    try:
        folder = path.resolve().parent
        has_folder, is_folder = folder.is_dir(), path.is_dir()
        writable = os.access(path if path.exists() else folder, os.W_OK)
    except (OSError, RuntimeError) as error:  # a path that is too long, or links in a loop
        raise UserError(f"--output-file {path!s:.200} cannot be written ({reason(error)})") from error
    if not has_folder:
        raise UserError(f"--output-file {path}: there is no folder {path.parent}; make it first")
    if is_folder:
        raise UserError(f"--output-file {path} is a folder; name a file in it")
    if not writable:
        raise UserError(f"--output-file {path} may not be written; name another file, or change its permissions")


def read_chat(system: str, tools: str) -> Chat:
    """The beginning of a conversation. `tools`: a file of schemas, or names of functions that are built in."""
    names = [name.strip() for name in tools.split(",")] if tools else []
    if all(name in TOOLS for name in names):
        chat = Chat(system, tuple(TOOLS[name] for name in dict.fromkeys(names)), executed=bool(names))
    elif not os.path.lexists(tools):
        unknown = next(name for name in names if name not in TOOLS)
        raise UserError(
            f"--tools {tools}: there is no such file, and no function '{unknown}' is built in; "
            + nearest(unknown, list(TOOLS))
        )
    else:
        chat = Chat(system, read_tools(Path(tools)), executed=False)
    check(chat.ask(""))
    return chat


def read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    """The schemas in a JSON file. Raises UserError."""
    value = read_json(path, "a JSON list of function schemas, as OpenAI's API takes them")
    try:
        found = from_wire({"messages": [{"role": "user", "content": ""}], "tools": value}).tools
        check_tools(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return found


def read_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a file, one per line or one in all (see --help). Prints their number to stderr."""
    if name == "-":
        return (_standard_input(),)
    path = Path(name)
    text = read_text(path, "prompts; for the output of a pipe, use --prompt-file - and the standard input")
    if path.suffix not in (".jsonl", *ONE_A_LINE):
        if lines := text.count("\n"):
            say(f"{path}: one prompt of {lines:,} lines", sys.stderr)
        return (text,)
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} has no prompts; write one on each line, as a JSON string if the file is a .jsonl")
    say(f"{path}: {len(lines):,} prompt{'s' * (len(lines) > 1)}, one a line", sys.stderr)
    if path.suffix == ".jsonl":
        return tuple(_json_prompt(line, f"{path}, line {number}") for number, line in lines)
    return tuple(line for _, line in lines)


def _json_prompt(line: str, where: str) -> str:
    try:
        prompt = parse_json(line)
    except ValueError as error:
        raise UserError(f'{where}: {error}; expected a JSON string such as "def f():\\n"') from error
    if not isinstance(prompt, str):
        raise UserError(f"{where}: expected a JSON string, got {type(prompt).__name__}")
    return prompt


def _standard_input() -> str:
    content = sys.stdin.buffer.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise UserError(f"the standard input holds more than {MAX_RECORD_BYTES:,} bytes; expected one prompt")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is not UTF-8 ({error.reason} at byte {error.start:,})") from error


def split_file(path: Path, line: int) -> tuple[str, str]:
    """The text before the start of a line, counted from 1, and the text from there on."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", read_text(path, "the code to complete"))
    if not 1 <= line <= len(lines) + 1:
        raise UserError(f"--line {line}: {path} has {len(lines)} lines; give 1 to {len(lines) + 1}")
    return "".join(lines[: line - 1]), "".join(lines[line - 1 :])


if __name__ == "__main__":
    run_cli(main)
