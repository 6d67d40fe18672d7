"""The operations of a trace: the time, FLOPs and memory traffic of each (`tools.bench.step --profile`).

Each moment of the trace is divided equally among the operations that run at that moment. Of nested operations only the
innermost counts; on CPUs, several threads may run operations at once. Time without any operation is idle, or is spent
in a product that XLA's CPU backend leaves to Eigen, whose threads are not traced. The shares therefore add up to the
measured time, on one core or many, and on CPUs, GPUs and TPUs.

FLOPs count matrix products, including those inside fusions. Bytes count operands and results, each once. Both are taken
from the compiled program for one run of an operation, and multiplied by how often it ran in a step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
SIZES |= {"u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}
SHAPE = re.compile(r"\b(\w+)\[([0-9,]*)\]")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?[\]})]) ([\w-]+)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")


class Event(NamedTuple):
    """One run of an operation on one thread or stream, in seconds."""

    name: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Operations of a step of the same kind: their seconds and runs, and the FLOPs and bytes of all runs."""

    name: str
    seconds: float
    runs: float
    flops: float
    bytes: float


class Instruction(NamedTuple):
    opcode: str
    results: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str


def rows_of(trace: Path, program: str, seconds: float, steps: int) -> list[Row]:
    """The operations of `steps` steps that took `seconds` in total, the most expensive first; the last row is the idle
    time. Operations of the same kind with results of the same shape, such as those of a model's layers, form one row.

    `trace`: a folder that jax.profiler wrote. `program`: the text of the compiled program.
    """
    lines = events_of(trace)
    owned = shares(lines)
    runs = collections.Counter(event.name for line in lines for event in line)
    costs = Costs(program)
    alike: dict[str, Row] = {}
    for name, own in owned.items():
        before = alike.get(label := costs.label(name), Row(label, 0.0, 0.0, 0.0, 0.0))
        count = runs[name] / steps
        flops, moved = costs.of(name)
        alike[label] = Row(
            label,
            before.seconds + own / steps,
            before.runs + count,
            before.flops + flops * count,
            before.bytes + moved * count,
        )
    idle = Row("(idle)", (seconds - sum(owned.values())) / steps, 0.0, 0.0, 0.0)
    return [*sorted(alike.values(), key=lambda row: -row.seconds), idle]


def events_of(trace: Path) -> list[list[Event]]:
    """The operations of a trace, as one list for each thread or stream."""
    import jax

    found = []
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                events = []
                for event in line.events:
                    name = _stats(event).get("hlo_op")
                    if name is not None and not event.name.startswith("end: "):
                        start = event.start_ns * 1e-9
                        events.append(Event(str(name), start, start + event.duration_ns * 1e-9))
                if events:
                    found.append(events)
    return found


def _stats(event: Any) -> dict[str, Any]:
    return {str(name): value for name, value in event.stats if name is not None}


def shares(lines: Sequence[Iterable[Event]]) -> dict[str, float]:
    """Seconds of each operation, divided as described in the first paragraph of the module."""
    borders: list[tuple[float, int, int, str]] = []
    for line, events in enumerate(lines):
        for event in events:
            borders += [(event.start, 1, line, event.name), (event.stop, 0, line, event.name)]
    running: dict[int, list[str]] = {}
    owned: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for moment, begins, line, name in sorted(borders, key=lambda border: border[:2]):
        active = [stack[-1] for stack in running.values() if stack]
        for innermost in active:
            owned[innermost] += (moment - before) / len(active)
        before = moment
        stack = running.setdefault(line, [])
        if begins:
            stack.append(name)
        elif name in stack:
            stack.reverse()
            stack.remove(name)  # the run that started last
            stack.reverse()
    return dict(owned)


class Costs:
    """FLOPs and bytes of the instructions of a compiled program, by name."""

    def __init__(self, program: str):
        self._instructions: dict[str, Instruction] = {}
        self._computations: dict[str, list[str]] = {}
        body: list[str] = []
        for line in program.splitlines():
            if found := INSTRUCTION.match(line):
                name, results, opcode, rest = found.groups()
                arguments = rest[: _end_of_arguments(rest)]
                operands = tuple(part.split()[-1].lstrip("%") for part in _split(arguments) if part.strip())
                self._instructions[name] = Instruction(opcode, _shapes(results), operands, rest)
                body.append(name)
            elif found := COMPUTATION.match(line):
                body = self._computations.setdefault(found[1], [])

    def of(self, name: str) -> tuple[float, float]:
        """(FLOPs of matrix products, bytes of operands and results); zeros for a name that is not in the program."""
        one = self._instructions.get(name)
        if one is None or one.opcode == "while":  # the operations in its body have their own rows
            return 0.0, 0.0
        shapes = [*one.results]
        for operand in one.operands:
            shapes += self._instructions[operand].results if operand in self._instructions else ()
        return self.flops(name), float(sum(math.prod(shape) * SIZES.get(kind, 0) for kind, shape in shapes))

    def label(self, name: str) -> str:
        """The kind of an instruction (its name without a number) and the shapes of its results."""
        results = self._instructions[name].results if name in self._instructions else ()
        shapes = (f"{kind}[{','.join(map(str, shape))}]" for kind, shape in results[:2])
        return " ".join([re.sub(r"(\.[0-9]+)+$", "", name), *shapes, *(["..."] if len(results) > 2 else [])])

    def flops(self, name: str) -> float:
        one = self._instructions[name]
        if one.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.rest)
            left = self._instructions.get(one.operands[0])
            if contracted is None or left is None:
                return 0.0
            sizes = [left.results[0][1][int(axis)] for axis in contracted[1].split(",") if axis]
            return 2.0 * math.prod(one.results[0][1]) * math.prod(sizes)
        if one.opcode not in ("fusion", "call"):
            return 0.0
        called = CALLED.search(one.rest)
        return sum(map(self.flops, self._computations.get(called[1], []))) if called else 0.0


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (kind, tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in SHAPE.findall(text)
        if kind in SIZES
    )


def _end_of_arguments(text: str) -> int:
    """The index at which the bracket closes that was opened before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text)


def _split(text: str) -> list[str]:
    """Splits `text` at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def table(rows: Sequence[Row], most: int = 25) -> str:
    """A table of the `most` most expensive operations, one row for all others, and the sum."""
    from smallcoder_jax.base.terminal import format_table, human_time

    *operations, idle = rows
    left = operations[most:]
    shown = [*operations[:most]]
    if left:
        sums = [sum(getattr(row, name) for row in left) for name in ("seconds", "runs", "flops", "bytes")]
        shown.append(Row(f"({len(left)} others)", *sums))
    total = sum(row.seconds for row in rows)
    cells = [
        (
            row.name,
            f"{row.seconds / total:.1%}",
            human_time(row.seconds),
            f"{row.runs:.0f}" if row.runs else "",
            f"{row.flops / row.seconds / 1e9:,.0f}" if row.flops and row.seconds > 0 else "",
            f"{row.bytes / row.seconds / 1e9:,.1f}" if row.bytes and row.seconds > 0 else "",
        )
        for row in [*shown, idle]
    ]
    cells.append(("one step", f"{sum(row.seconds for row in rows) / total:.0%}", human_time(total), "", "", ""))
    return format_table(["operation", "share", "time", "runs", "GFLOP/s", "GB/s"], cells)
