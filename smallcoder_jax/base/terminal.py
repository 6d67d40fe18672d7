"""Terminal output: aligned tables, readable numbers, one progress line, and a summary at the end.

Uses the standard library only, so that importing it costs a command nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TextIO

from smallcoder_jax.base.display import one_line, printable, say

ETA_WINDOW = 100  # steps over which the pace for the estimated remaining time is measured
SAMPLE_LINES, SAMPLE_WIDTH = 8, 100  # limits of a sample text shown during training


def human_count(count: float) -> str:
    """A count in three or four digits: 999 -> '999', 100682496 -> '100.7M'."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,950 would print as '1000.0K': round up to the next unit instead.
        if abs(count) >= factor * 0.99995 and abs(count) >= 1000:
            return f"{count / factor:.1f}{suffix}"
    return f"{count:.0f}"


def human_bytes(count: float) -> str:
    """A size with a binary unit: 1536 -> '1.5 KiB'."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= factor * 0.99995:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def human_time(seconds: float) -> str:
    """A duration in at most two units: 0.0123 -> '12ms', 61.2 -> '1m01s', 93780 -> '1d02h'; '?' if not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def screen_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream; None where there is no terminal and lines may have any length."""
    if not stream.isatty():
        return None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a stream that claims to be a TTY but has no terminal behind it
        columns = 0
    return columns or 80


def named_values(entries: Iterable[tuple[str, object]], width: int | None) -> list[str]:
    """Lines that show names and, in a second column, their values. A value that is too long for `width` is continued on
    the next line of its column. Words, such as paths, are never split.
    """
    shown = [(one_line(name), one_line(str(value))) for name, value in entries]
    column = max((len(name) for name, _ in shown), default=0) + 2
    lines = []
    for name, value in shown:
        parts = [value]
        if width is not None:
            room = max(width - column, 20)
            parts = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{label:<{column}}{part}".rstrip() for label, part in zip_longest([name], parts, fillvalue="")]
    return lines


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """A plain-text table: columns two spaces apart, numbers right-aligned, a rule under the headers. If the table is
    wider than `width` (by default the terminal on standard output), each row becomes a block of names and values.

    Cells are shown with `str`. With empty `headers` the heading and the rule are omitted. Raises ValueError where a
    row's number of cells differs from the number of columns.
    """
    headers = [one_line(header) for header in headers]
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    width = screen_width(sys.stdout) if width is None else width
    columns = len(headers) if headers else len(cells[0]) if cells else 0
    for row in cells:
        if len(row) != columns:
            raise ValueError(f"table row {row} has {len(row)} cells, expected {columns}")
    heading = [headers] if headers else []
    widths = [max(len(row[column]) for row in heading + cells) for column in range(columns)]
    right = [bool(cells) and all(_is_numeric(row[column]) for row in cells) for column in range(columns)]

    def line(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        )
        return "  ".join(parts).rstrip()

    lines = [line(row) for row in heading]
    if heading:
        lines.append("  ".join("-" * width for width in widths))
    lines += [line(row) for row in cells]
    if headers and width is not None and max(map(len, lines)) > width:
        return "\n\n".join("\n".join(named_values(zip(headers, row, strict=True), width)) for row in cells)
    return "\n".join(lines)


def _is_numeric(cell: str) -> bool:
    """Whether a cell is a quantity ('1,234', '12.5%', '3.1 MiB', '-'), so that its column is right-aligned."""
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


class Terminal:
    """Shows one progress line on a TTY, and anywhere else plain lines, at most one per `log_every` steps.

    Every method may be called while a progress line is on the screen: it is cleared first, so that nothing overlaps.
    """

    def __init__(self, stream: TextIO, *, total_steps: int, log_every: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._log_every = log_every
        self._tty = stream.isatty()
        self._drawn = 0  # characters of the progress line now on the screen
        self._logged = False
        self._times: deque[tuple[int, float]] = deque()  # (step, seconds) of the last ETA_WINDOW steps

    def note(self, text: str) -> None:
        """Prints a separate line, such as a notice, an evaluation or a saved checkpoint."""
        self._clear()
        say(text, self._stream)

    def at_once(self, text: str) -> None:
        """Prints a line from a signal handler, which may have interrupted a write to the stream."""
        with contextlib.suppress(OSError, ValueError):  # closed, or no file at all
            os.write(self._stream.fileno(), f"\n{text}\n".encode())

    def sample(self, prompt: str, text: str) -> None:
        """Prints a prompt and the model's continuation, at most SAMPLE_LINES lines."""
        lines = printable(prompt + text).rstrip("\n").split("\n")
        more = ["..."] if len(lines) > SAMPLE_LINES else []
        self.note("\n".join(f"    | {line[:SAMPLE_WIDTH]}".rstrip() for line in [*lines[:SAMPLE_LINES], *more]))

    def start_table(self, title: str, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Prints what is about to run: section (parameters, memory, mesh, kernels, data) -> name -> value."""
        width = max(map(len, sections), default=0)
        # All values are left-aligned: they are of all kinds, and right-aligned mixed units are harder to read.
        entries = [
            (f"{'' if index else section:<{width}}  {name}", value)
            for section, values in sections.items()
            for index, (name, value) in enumerate(values.items())
        ]
        lines = [one_line(title), *named_values(entries, screen_width(self._stream))]
        rule = "-" * max(map(len, lines))
        self.note("\n".join([lines[0], rule, *lines[1:], rule]))

    def progress(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Shows step `step`. `metrics`: loss, accuracy, learning_rate, grad_norm, tokens_per_second, mfu (a fraction),
        data_wait (seconds per step). Metrics that are missing or None are omitted."""
        self._times.append((step, time.monotonic()))
        while len(self._times) > 1 and self._times[1][0] <= step - ETA_WINDOW:
            self._times.popleft()
        if self._tty:
            width = screen_width(self._stream)
            line = progress_line(step, self._total_steps, metrics, self.eta(), None if width is None else width - 1)
            self._stream.write("\r" + line.ljust(self._drawn))
            self._stream.flush()
            self._drawn = len(line)
        elif not self._logged or step % self._log_every == 0 or step == self._total_steps:
            self._logged = True
            say(progress_line(step, self._total_steps, metrics, self.eta()), self._stream)

    def eta(self) -> float:
        """Seconds until the last step at the pace of the last ETA_WINDOW steps; NaN before two steps were seen."""
        if not self._times or self._times[0][0] == self._times[-1][0]:
            return math.nan
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        return (last_time - first_time) / (last_step - first_step) * (self._total_steps - last_step)

    def end_summary(
        self, title: str, results: Mapping[str, object], paths: Mapping[str, object], commands: Sequence[str]
    ) -> None:
        """Prints the results, the paths of what was written and the commands to run next."""
        lines = ["", one_line(title)]
        for entries in (results, paths):
            lines += [""] if entries else []
            lines += named_values(((f"  {name}", value) for name, value in entries.items()), screen_width(self._stream))
        if commands:
            lines += ["", "Next:", *(f"  {one_line(command)}" for command in commands)]
        self.note("\n".join(lines))

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0


def progress_line(
    step: int, total_steps: int, metrics: Mapping[str, float | None], eta: float, width: int | None = None
) -> str:
    """The progress line in at most `width` characters: the least informative fields are omitted until it fits."""
    fields = [("step", f"{step:>{len(str(total_steps))}}/{total_steps}")]
    formats = {
        "loss": lambda value: f"loss {value:.4f}",
        "accuracy": lambda value: f"acc {value:.1%}",
        "learning_rate": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"grad {value:.3g}",
        "tokens_per_second": lambda value: f"{human_count(value) if math.isfinite(value) else '?'} tok/s",
        "mfu": lambda value: f"MFU {value:.1%}",
        "data_wait": lambda value: f"wait {human_time(value)}",
    }
    for name, show in formats.items():
        value = metrics.get(name)
        if value is not None:
            fields.append((name, show(value)))
    if step < total_steps:
        fields.append(("eta", f"ETA {human_time(eta)}"))
    if width is not None:
        for name in ("data_wait", "mfu", "learning_rate", "grad_norm", "accuracy", "tokens_per_second", "eta"):
            if len("  ".join(text for _, text in fields)) > width:
                fields = [field for field in fields if field[0] != name]
    line = "  ".join(text for _, text in fields)
    return line if width is None else line[: max(width, 0)]
