"""Handles SIGTERM and Ctrl-C. Before the first step they end the run at once; later it stops between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from smallcoder_jax.base.errors import Interrupted

_AGAIN_SECONDS = 0.05


class StopRequest:
    """Turns SIGTERM or SIGINT into a request that the loop checks between steps. A second SIGINT interrupts at once."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self.asked = asked
        self.requested = False

    def __enter__(self) -> StopRequest:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.asked()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM raise Interrupted in the body, so that temporary files are removed. Works on the main thread only.

    If the signal arrives in a finalizer or a callback of the garbage collector, from which no exception can propagate,
    it is sent again. If other code caught the exception, it is raised again at the end of the body.
    """
    message = "interrupted before the first step; nothing was lost, the same command starts again"
    heard: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        heard.append(threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)))
        raise Interrupted(message)

    def lost(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            heard[-1].start()
        else:
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, hook = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = lost
    try:
        yield
        if heard:
            raise Interrupted(message)
    finally:
        for timer in heard:
            timer.cancel()
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, previous)
