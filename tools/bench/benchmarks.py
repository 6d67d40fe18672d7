"""Writes the figures in docs/benchmarks/*.jsonl as one page, docs/benchmarks.md.

    python -m tools.bench.benchmarks [--check]

Each file is a subject, and each line one measured figure as a JSON object (FIELDS). The page shows the newest value of
every figure on every kind of machine, and the later line of two from the same day. docs/benchmarks/template.txt
contains the page's prose and the place of each subject's table. A line whose value is null names a figure that nobody
has measured yet.

The benchmarks append lines with `record` (their flag --record). --check writes nothing, and ends with exit code 3 if
the page differs from what the files give.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from smallcoder_jax.base import files
from smallcoder_jax.base.arguments import ArgumentParser
from smallcoder_jax.base.display import code, markdown, say
from smallcoder_jax.base.errors import CheckFailed, UserError, run_cli
from tools.bench.step_timing import cores

ROOT = Path(__file__).resolve().parents[2]
FOLDER, PAGE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "benchmarks.md"
WIDTH = 110
# The largest width of a cell in each column. With separators and the numbers of runs, a row is WIDTH long.
FIGURE_WIDTH, VALUE_WIDTH, LIMIT_WIDTH, MACHINE_WIDTH = 50, 16, 12, 6
DIGITS = 5  # recorded digits of a measured value
RECORD_HELP = "append the figures to docs/benchmarks/, with date, commit, machine, versions and load"
# The load before this command used the cores itself.
LOAD_AT_START = os.getloadavg()[0]
VECTOR_EXTENSIONS = {"AVX-512": "avx512f", "AMX": "amx_tile"}
Line = dict[str, Any]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_date(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", value) is not None


# The fields of a line, in this order, each with the expected value in words and a check.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "figure": (
        f"one line of at most {FIGURE_WIDTH} characters",
        lambda value: _text(value) and len(markdown(value)) <= FIGURE_WIDTH,
    ),
    "value": (
        "a number, a line of text, or null: not measured",
        _optional(lambda value: _number(value) or _text(value)),
    ),
    "unit": ("a line of text or null", _optional(_text)),
    "limit": (
        f"one line of at most {LIMIT_WIDTH} characters, or null",
        _optional(lambda value: _text(value) and len(markdown(value)) <= LIMIT_WIDTH),
    ),
    "holds": ("true, false or null", _optional(lambda value: isinstance(value, bool))),
    "date": ("YYYY-MM-DD, or null where nothing is measured", _optional(_is_date)),
    "commit": ("a line of text or null", _optional(_text)),
    "machine": ("a line of text or null", _optional(_text)),
    "versions": ("a line of text or null", _optional(_text)),
    "command": ("a line of text or null", _optional(_text)),
    "load": (
        'a number, "alone", "beside other work", or null',
        _optional(lambda value: _number(value) or value in ("alone", "beside other work")),
    ),
    "note": ("a line of text or null", _optional(_text)),
}
RUN = ("date", "machine", "commit", "versions", "load", "command")  # fields that are equal for all figures of one run


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured figure; `record` adds when, where and how it was measured."""

    figure: str
    value: float | str
    unit: str | None = None
    limit: str | None = None
    holds: bool | None = None
    note: str | None = None


def main(argv: list[str] | None = None) -> int | None:
    parser = ArgumentParser(
        prog="python -m tools.bench.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    options = parser.parse_args(argv)
    page = render(FOLDER).encode()
    if not options.check:
        files.write_bytes(PAGE, page)
    elif files.read_bytes(PAGE, "the page of the benchmarks") != page:
        raise CheckFailed(f"{PAGE} is not what {FOLDER} gives; python -m tools.bench.benchmarks writes it")
    return None


def record(subject: str, figures: Sequence[Figure]) -> None:
    """Appends `figures` to the file of `subject`, with date, commit, machine, versions, command as typed, and the load
    at the start. Raises UserError if there is no such file or a figure does not fit into a line.
    """
    path = FOLDER / f"{subject}.jsonl"
    before = files.read_bytes(path, "the figures of this subject; --record needs a checkout of the project")
    run = {
        "date": files.utc_now()[:10],
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "load": round(LOAD_AT_START, 2),
    }
    added = []
    for figure in figures:
        line = {**dataclasses.asdict(figure), **run}
        if isinstance(figure.value, float):
            line["value"] = float(f"{figure.value:.{DIGITS}g}")
        added.append(json.dumps(files.finite({name: line[name] for name in FIELDS}), ensure_ascii=False))
        parse(added[-1], f"{figure.figure}, as it was measured")
    start = before if before.endswith(b"\n") or not before else before + b"\n"
    files.write_bytes(path, start + "".join(f"{line}\n" for line in added).encode())
    say(f"{len(added)} figures added to {path}; python -m tools.bench.benchmarks shows them on the page", sys.stderr)


def short(name: str) -> str:
    """A model's name as it is written in figures."""
    return name.removeprefix("smallcoder-")


def parse(text: str, where: str) -> Line:
    """The line as an object. Raises UserError, which names `where`, if the line does not match FIELDS."""
    try:
        line = files.parse_json(text, unique_keys=True)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected a JSON object") from error
    if not isinstance(line, dict) or set(line) != set(FIELDS):
        raise UserError(f"{where}: expected a JSON object with the keys {', '.join(FIELDS)}, and no others")
    for name, (expected, is_sound) in FIELDS.items():
        if not is_sound(line[name]):
            raise UserError(f"{where}: {name} is {json.dumps(line[name], ensure_ascii=False)}; expected {expected}")
    if (line["value"] is None) != (line["date"] is None) or (line["value"] is None and line["holds"] is not None):
        raise UserError(
            f"{where}: a figure that was measured has a value and a date; one that was not, no holds either"
        )
    if len(shown(line)) > VALUE_WIDTH:
        raise UserError(f"{where}: value and unit take {len(shown(line))} characters; expected at most {VALUE_WIDTH}")
    return line


def read(path: Path) -> list[Line]:
    """The lines of a subject. Raises UserError, which names file and line, for an invalid line."""
    content = files.read_text(path, "measured figures, a JSON object a line")
    lines = content.removesuffix("\n").split("\n") if content else []
    return [parse(text, f"{path}, line {number}") for number, text in enumerate(lines, 1)]


def render(folder: Path) -> str:
    """The page made from the files of `folder`. Raises UserError if a file or the template is malformed."""
    subjects = {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}
    names = machine_names(line for lines in subjects.values() for line in lines)
    parts = {subject: section(lines, names) for subject, lines in subjects.items()}
    parts["machines"] = [line for text, name in names.items() for line in _item(f"- **{name}**: {markdown(text)}")]
    parts["not measured"] = not_measured(subjects)
    template = folder / "template.txt"
    page = []
    for number, text in enumerate(files.read_text(template, "the prose of the page").splitlines(), 1):
        place = re.fullmatch(r"<!-- ([a-z -]+) -->", text)
        if place and place[1] not in parts:
            raise UserError(f"{template}, line {number}: {place[1]} is no file of {folder}, or is placed twice")
        if len(text) > WIDTH:
            raise UserError(f"{template}, line {number}: {len(text)} characters; expected at most {WIDTH}")
        page += parts.pop(place[1]) if place else [text]
    if parts:
        raise UserError(f"{template} has no place for {', '.join(parts)}; expected a line <!-- name --> for each")
    return "\n".join(page) + "\n"


def machine_names(lines: Iterable[Line]) -> dict[str, str]:
    """A short name for each kind of machine, the earliest first: the last word of the first part of its description,
    with a number if another machine already has that name.
    """
    first: dict[str, str] = {}
    for line in lines:
        if line["machine"] and line["date"]:
            first[line["machine"]] = min(line["date"], first.get(line["machine"], line["date"]))
    names: dict[str, str] = {}
    for text in sorted(first, key=lambda text: (first[text], text)):
        part = re.split(r"[(,;]", text)[0].split() or ["?"]
        word = name = re.sub(r"[\W_]", "", part[-1])[:MACHINE_WIDTH]
        number = 1
        while name in names.values():
            number += 1
            name = f"{word[: MACHINE_WIDTH - len(f' {number}')]} {number}"
        names[text] = name
    return names


def newest(lines: Iterable[Line]) -> list[Line]:
    """The newest line of each figure and machine, in the order of the figures' newest runs, newest first."""
    latest: dict[tuple[str, str], tuple[Line, int]] = {}
    runs: list[tuple[Any, ...]] = []
    for line in lines:
        if line["value"] is None:
            continue
        if _run(line) not in runs:
            runs.append(_run(line))
        key = (line["figure"], line["machine"])
        if key not in latest or line["date"] >= latest[key][0]["date"]:
            latest[key] = line, runs.index(_run(line))
    found = sorted(latest.values(), key=lambda found: (found[0]["date"], found[1]), reverse=True)
    figures = list(dict.fromkeys(line["figure"] for line, _ in found))
    return [line for line, _ in sorted(found, key=lambda found: figures.index(found[0]["figure"]))]


def section(lines: Iterable[Line], names: dict[str, str]) -> list[str]:
    """The table of a subject, and the list of the runs that its rows come from."""
    rows = [["figure", "value", "limit", "held", "on", "run"]]
    runs: dict[tuple[Any, ...], list[Line]] = {}
    for line in newest(lines):
        runs.setdefault(_run(line), []).append(line)
        number = list(runs).index(_run(line)) + 1
        holds = {True: "yes", False: "NO", None: ""}[line["holds"]]
        where = names.get(line["machine"], "")
        rows.append([markdown(line["figure"]), shown(line), markdown(line["limit"] or ""), holds, where, str(number)])
    if not runs:
        return ["Nothing has been measured."]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    listed = [
        text for number, of_run in enumerate(runs.values(), 1) for text in _item(f"{number}. {described(of_run)}")
    ]
    return [*table, "", *listed]


def shown(line: Line) -> str:
    """Value and unit as a cell of the table."""
    value, unit = line["value"], line["unit"]
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    elif isinstance(value, int):
        value = f"{value:,}"
    return markdown(f"{value}{'' if unit in (None, '%') else ' '}{unit or ''}")


def described(lines: Sequence[Line]) -> str:
    """What the figures of a run have in common, and the parts of their notes, each with its figures."""
    first = lines[0]
    load = first["load"] if isinstance(first["load"], str | None) else f"load {first['load']}"
    commit = first["commit"] and f"commit {first['commit']}"
    text = markdown(", ".join(part for part in (first["date"], commit, load, first["versions"]) if part))
    parts = [f"{text}: `{code(first['command'])}`" if first["command"] else text]
    notes: dict[str, list[str]] = {}
    for line in lines:
        for note in (line["note"] or "").split("; "):
            notes.setdefault(note, []).append(line["figure"])
    notes.pop("", None)
    of_figures: dict[tuple[str, ...], list[str]] = {}
    for note, figures in sorted(notes.items(), key=lambda item: len(item[1]) < len(lines)):
        of_figures.setdefault(tuple(figures), []).append(markdown(note))
    for figures, texts in of_figures.items():
        others = [line["figure"] for line in lines if line["figure"] not in figures]
        about = "all but " + "; ".join(others) if len(others) < len(figures) else "; ".join(figures)
        parts.append((f"*{markdown(about)}*: " if others else "") + ", ".join(texts))
    return "; ".join(parts) + "."


def not_measured(subjects: dict[str, list[Line]]) -> list[str]:
    """A list of the figures that have lines only without a value, grouped by command."""
    commands: dict[str | None, list[str]] = {}
    for lines in subjects.values():
        measured = {line["figure"] for line in lines if line["value"] is not None}
        for line in lines:
            if line["value"] is None and line["figure"] not in measured:
                about = ", ".join(part for part in (line["limit"], line["note"]) if part)
                text = markdown(line["figure"] + (f" ({about})" if about else ""))
                commands.setdefault(line["command"], []).append(text)
    listed = [
        _item(f"- {'; '.join(texts)}" + (f": `{code(command)}`" if command else ""))
        for command, texts in commands.items()
    ]
    return [line for lines in listed for line in lines]


def _run(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in RUN)


def _item(text: str) -> list[str]:
    """An item of a list, wrapped, its lines after the first indented."""
    indent = " " * (text.index(" ") + 1)
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def commit() -> str | None:
    """The commit of the checkout, with "+changes" if files other than those of the benchmarks differ from it."""
    try:
        found = _output("git", "rev-parse", "--short", "HEAD")
        changed = _output("git", "status", "--porcelain", "--", ".", ":!docs/benchmarks", ":!docs/benchmarks.md")
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+changes" if changed else "")


def machine() -> str:
    """A description of this machine: its GPUs, or its cores, CPU, vector extensions and memory."""
    if gpus := _gpus():
        name, _, power = gpus[0]
        count = "one" if len(gpus) == 1 else str(len(gpus))
        return f"{count} {name} ({power}), {cores()} cores"
    memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    name, extensions = cpu(Path("/proc/cpuinfo"))
    article = "an" if name[0] in "AEIOU" else "a"
    listed = f" ({', '.join(extensions)})" if extensions else ""
    return f"{cores()} cores of {article} {name}{listed}, {memory} GiB"


def cpu(cpuinfo: Path) -> tuple[str, list[str]]:
    """The family of the CPU, without model numbers, and the vector extensions that determine its speed."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(re.findall(r"^([^\t\n:]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    model = re.sub(r"\((R|TM)\)|@.*", "", fields.get("model name") or platform.processor() or platform.machine())
    words = [word for word in model.split() if word not in ("CPU", "Processor") and not re.search(r"\d", word)]
    flags = fields.get("flags", "").split()
    return " ".join(words) or model, [name for name, flag in VECTOR_EXTENSIONS.items() if flag in flags]


def versions() -> str:
    """The versions of Python, jax and flax, and of the GPU driver if there is one."""
    installed = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    return ", ".join([f"Python {platform.python_version()}", *installed, *(f"driver {gpu[1]}" for gpu in _gpus()[:1])])


@functools.cache
def _gpus() -> list[tuple[str, str, str]]:
    """Name, driver and power limit of each GPU that JAX may use."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    try:
        text = _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return []
    found = []
    for row in text.splitlines():
        name, driver, power = (part.strip() for part in row.split(","))
        found.append((name, driver, re.sub(r"\.\d+ ", " ", power)))
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run_cli(main)
