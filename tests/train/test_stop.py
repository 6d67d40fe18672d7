"""SIGTERM before the first step ends a run wherever it comes, and what it was doing is cleaned up."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable

import pytest

from smallcoder_jax.base.errors import Interrupted
from smallcoder_jax.train.stop import interruptible


def in_the_open() -> None:
    signal.raise_signal(signal.SIGTERM)


def in_a_callback_of_the_collector() -> None:
    def once(phase: str, info: dict) -> None:
        gc.callbacks.remove(once)
        signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(once)
    gc.collect()


def in_a_finalizer() -> None:
    class Ends:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    Ends()


def where_it_is_caught() -> None:
    with contextlib.suppress(Interrupted):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("terminate", "goes_on"),
    [
        (in_the_open, False),
        (in_a_callback_of_the_collector, False),
        (in_a_finalizer, False),
        (where_it_is_caught, True),
    ],
)
def test_a_signal_ends_the_body(terminate: Callable[[], None], goes_on: bool) -> None:
    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    reached: list[str] = []

    def body() -> None:
        try:
            terminate()
            deadline = time.monotonic() + (0.2 if goes_on else 20.0)
            while time.monotonic() < deadline:
                time.sleep(0.01)
            reached.append("end")
        finally:
            reached.append("cleaned")

    with pytest.raises(Interrupted, match="before the first step"), interruptible():
        body()
    assert reached == (["end", "cleaned"] if goes_on else ["cleaned"])
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == (handler, hook)


def test_without_a_signal_nothing_is_raised() -> None:
    with interruptible():
        reached = True
    assert reached
