"""Completes code with a trained model.

    python -m tools.generate --checkpoint runs/nano --prompt "def fibonacci(n):"
    python -m tools.generate --checkpoint runs/nano/export --file app.py --line 12
    python -m tools.generate --checkpoint runs/nano --interactive

Completions go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError, run_cli
from smallcoder_jax.generate.engine import Completion, Generator
from smallcoder_jax.generate.prompts import Prompt
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.session import Session


def main(argv: list[str] | None = None) -> int | None:
    """Parses the flags, loads the model and completes. Raises UserError on bad input."""
    args = build_parser().parse_args(argv)
    job = read_job(args)
    import smallcoder_jax

    generator = smallcoder_jax.load(args.checkpoint, step=args.step).generator
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    job.run(generator, input, sys.stdout, sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = SamplingOptions()
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder or an export folder")
    parser.add_argument("--step", default=None, help="checkpoint of a run: a step number or 'best', the default")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    what.add_argument(
        "--prompt-file", type=Path, help="one JSON string per line if it ends in .jsonl, else the file is one prompt"
    )
    what.add_argument("--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="write what goes between the two texts")
    what.add_argument("--file", type=Path, help="write what goes into this file, at the start of --line")
    what.add_argument("--interactive", action="store_true", help="complete what is typed; /help lists the commands")
    parser.add_argument("--line", type=int, help="line of --file, counted from 1; one past the last appends")
    parser.add_argument("--output-file", type=Path, help="write completions here, one JSON object per line")
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
class Job:
    """What the flags ask for, read and checked before the model is loaded."""

    options: SamplingOptions
    batch_size: int
    prompts: tuple[str, ...] = ()
    around: tuple[str, str] | None = None  # prefix and suffix of what is to be filled in
    interactive: bool = False
    output_file: Path | None = None

    def run(self, generator: Generator, read: Callable[[str], str], output: TextIO, log: TextIO) -> None:
        """Completes with `generator`; `read` is asked for lines in an interactive session."""
        if self.interactive:
            return Session(generator, self.options, read, output).run()
        prompts: Sequence[str | Prompt] = self.prompts
        if self.around:
            prompts = [generator.fim_prompt(*self.around, self.options)]
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
        self._write(completions, output)
        tokens = sum(len(completion.token_ids) for completion in completions)
        say(f"{tokens} tokens in {seconds:.1f} s, compilation and prompts included", log)

    def _write(self, completions: list[Completion], output: TextIO) -> None:
        if self.output_file:
            lines = [json.dumps(record(c, i, self.options)) + "\n" for i, c in enumerate(completions)]
            self.output_file.write_text("".join(lines), encoding="utf-8")
            return
        for i, completion in enumerate(completions):
            if len(completions) > 1:
                prompt, sample = divmod(i, self.options.num_samples)
                output.write(f"=== prompt {prompt + 1}, sample {sample + 1} ===\n")
            # A middle stands by itself: it goes into a file that the user has. A continuation is read with its start.
            text = completion.text if self.around else completion.prompt + completion.text
            output.write(text if text.endswith("\n") else text + "\n")


def record(completion: Completion, index: int, options: SamplingOptions) -> dict[str, object]:
    """One line of the output file."""
    return {
        "prompt": completion.prompt,
        "sample": index % options.num_samples,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "tokens_per_second": round(completion.tokens_per_second, 1),
        "seed": options.seed,
    }


def read_job(args: argparse.Namespace) -> Job:
    """Checks the flags and reads the files that they name. Raises UserError."""
    if (args.file is None) != (args.line is None):
        raise UserError("--file and --line go together: the file to complete and the line to complete it at")
    if args.interactive and (args.output_file or args.num_samples != 1):
        raise UserError(
            "--interactive answers on the terminal, once per prompt; leave --output-file and --num-samples out"
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
        truncate_prompt=args.truncate or args.file is not None,  # of a whole file, what is near the line is wanted
    )
    prompts: tuple[str, ...] = tuple(args.prompt or ())
    around: tuple[str, str] | None = tuple(args.fim) if args.fim else None
    if args.prompt_file:
        prompts = read_prompts(args.prompt_file)
    if args.file:
        around = split_file(args.file, args.line)
    return Job(options, args.batch_size, prompts, around, args.interactive, args.output_file)


def check_output(path: Path) -> None:
    """Refuses a file that could not be written after all the work. Raises UserError."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"--output-file {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"--output-file {path} is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--output-file {path} may not be written; name another file, or change its permissions")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: one JSON string per line of a .jsonl, else the whole text."""
    text = _read_text(path)
    if path.suffix != ".jsonl":
        return (text,)
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f'{path}, line {number}: {error}; expected a JSON string such as "def f():\\n"') from error
        if not isinstance(prompt, str):
            raise UserError(f"{path}, line {number}: expected a JSON string, got {type(prompt).__name__}")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no prompts; write one JSON string per line")
    return tuple(prompts)


def split_file(path: Path, line: int) -> tuple[str, str]:
    """The text before the start of a line, counted from 1, and the text from there on."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", _read_text(path))
    if not 1 <= line <= len(lines) + 1:
        raise UserError(f"--line {line}: {path} has {len(lines)} lines; give 1 to {len(lines) + 1}")
    return "".join(lines[: line - 1]), "".join(lines[line - 1 :])


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # bytes: line ends stay as they are
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; convert it first") from error


if __name__ == "__main__":
    run_cli(main)
