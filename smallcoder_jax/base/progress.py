"""Shows the progress of data preparation: one line that is rewritten on a terminal, a plain line every
_PLAIN_SECONDS elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from smallcoder_jax.base.display import one_line

_BAR = 24
_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.2, 10.0


class Progress:
    """Writes documents, megabytes and rate to `stream`, for one step of the preparation after the other."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._terminal = stream.isatty()
        self._width = 0
        self.start("")

    def start(self, title: str, total_bytes: int = 0) -> None:
        """Begins a step. With `total_bytes`, its size, a progress bar is drawn."""
        self._title, self._total = title, total_bytes
        self._documents, self._bytes = 0, 0
        self._began = self._shown = time.monotonic()

    def add(self, size: int) -> None:
        """Counts one document of `size` bytes."""
        self._documents += 1
        self._bytes += size
        now = time.monotonic()
        if now - self._shown >= (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            self._shown = now
            self._write(self._line(), end=False)

    def finish(self) -> None:
        """Ends the step and shows its totals."""
        self._write(self._line(), end=True)

    def note(self, text: str) -> None:
        """Writes a line about a step that has nothing to count."""
        self._write(text, end=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        counts = f"{self._documents:,} documents, {self._bytes / 1e6:.1f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s"
        if not self._total:
            return f"{self._title}: {counts}"
        done = min(1.0, self._bytes / self._total)
        bar = ("#" * round(done * _BAR)).ljust(_BAR, ".")
        return f"{self._title}: [{bar}] {done:4.0%} {counts}"

    def _write(self, line: str, *, end: bool) -> None:
        line = one_line(line)
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if end else ""))
            self._width = 0 if end else len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
