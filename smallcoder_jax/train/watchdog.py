"""Ends a run that waits too long for something, and says for what. A hung run costs as much as one that trains."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import EXIT_STALLED

_EVERY, _MOST = 0.2, 1.0  # seconds between two checks: intended, and at most counted


class _Wait(NamedTuple):
    what: str
    seconds: float  # 0: no limit
    since: float  # by the watchdog's clock


class Watchdog:
    """Watches one thread. `with watchdog: with watchdog.wait("a batch (guard.data_seconds)", 60): ...`

    When a wait lasts longer than its seconds, the stacks of all threads go to standard error and to a file
    `stacks-TIME-PID.txt` in `folder`, and the process exits with EXIT_STALLED, because no gentler way ends a thread
    that hangs in a library. Time in which the whole process was stopped (Ctrl-Z, a paused container) does not count.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._wait: _Wait | None = None
        self._limit: _Wait | None = None
        self._ended = threading.Event()
        self._clock = 0.0  # seconds in which the process was running, so that the watchdog could check

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def wait(self, what: str, seconds: float) -> Iterator[None]:
        """Limits the time of the body. An inner wait replaces the outer one until it ends."""
        outer, self._wait = self._wait, _Wait(what, seconds, self._clock)
        try:
            yield
        finally:
            self._wait = None if outer is None else outer._replace(since=self._clock)

    def each(self, what: str, seconds: float, items: Iterable[Any]) -> Iterator[Any]:
        """Yields `items`, and limits the time of waiting for each."""
        iterator = iter(items)
        while True:
            with self.wait(what, seconds):
                item = next(iterator, self)
            if item is self:
                return
            yield item

    def limit(self, what: str, seconds: float) -> None:
        """Gives the process `seconds` from now to end, whatever it waits for."""
        self._limit = _Wait(what, seconds, self._clock)

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(_EVERY):
            before, looked = looked, time.monotonic()
            self._clock += min(looked - before, _MOST)
            for wait in (self._wait, self._limit):
                if wait is not None and wait.seconds and self._clock - wait.since > wait.seconds:
                    self._end(wait)

    def _end(self, wait: _Wait) -> None:
        say(f"\nerror: stalled: waited more than {wait.seconds:g} s for {wait.what}", sys.stderr)
        moment = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        path = self._folder / f"stacks-{moment}-{os.getpid()}.txt"
        try:
            with path.open("w") as file:
                file.write(f"waited more than {wait.seconds:g} s for {wait.what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            say(f"the stacks of all threads are in {path}; the same command continues the run", sys.stderr)
        except OSError as error:
            say(f"{path} cannot be written: {error}", sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(EXIT_STALLED)
