"""Fault injection: `--inject=kill@save:3,nan@step:10` shows what a run does when the machine fails.

A run calls `reach` at each place where a fault can be injected; without `--inject` nothing happens there.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import UserError

PLACES = {
    "prepare": "before data is prepared",
    "compile": "before the step is compiled",
    "step": "before step N is dispatched",
    "data": "before batch N is read, on the thread that reads it",
    "evaluation": "before evaluation N",
    "save": "in save N, before the arrays are written",
    "manifest": "in save N, when the arrays are written and the step does not exist yet",
    "checkpoint": "when save N is complete",
}
KINDS = {
    "kill": "the process gets SIGKILL",
    "sigterm": "the process gets SIGTERM",
    "stall": "the thread waits for ever",
    "nan": "the weights of the batch become NaN",
    "diskfull": "no file can grow any more",
    "bitflip": "one bit of the largest file of the checkpoint is flipped",
}
ONLY_AT = {"nan": "step", "diskfull": "save", "bitflip": "checkpoint"}


@dataclasses.dataclass(frozen=True)
class Fault:
    kind: str
    place: str
    at: int  # steps are counted from the start of the run, everything else from the start of the process


class Faults:
    """The faults to inject into one process, each of them once."""

    def __init__(self, spec: str = ""):
        """Parses a comma-separated list of KIND@PLACE[:N]; N is 1 where it is left out. Raises UserError."""
        self._waiting = [_parse(part.strip()) for part in spec.split(",") if part.strip()]
        self._reached: Counter[str] = Counter()

    def reach(self, place: str, at: int | None = None) -> set[str]:
        """Injects the faults that are due at this place. Returns the kinds that the caller has to inject itself.

        `at` is the number of the step. At other places the calls are counted here.
        """
        self._reached[place] += 1
        number = self._reached[place] if at is None else at
        due = [fault for fault in self._waiting if (fault.place, fault.at) == (place, number)]
        for fault in due:
            self._waiting.remove(fault)
            say(f"injected: {fault.kind}@{fault.place}:{fault.at}", sys.stderr)
            _strike(fault.kind)
        return {fault.kind for fault in due} & {"nan", "bitflip"}


NONE = Faults()


def poisoned(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with NaN in place of its weights, as faulty memory could leave them."""
    import jax
    import jax.numpy as jnp

    with jax.transfer_guard("allow"):
        return {
            name: array * jnp.float32("nan") if jnp.issubdtype(array.dtype, jnp.floating) else array
            for name, array in batch.items()
        }


def flip_bit(folder: Path) -> Path:
    """Flips the middle bit of the largest file under `folder`, and returns its path."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0b1000]))
    return path


def _strike(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "stall":
        threading.Event().wait()
    elif kind == "diskfull":  # no file can grow beyond 4096 bytes: EFBIG on every thread and in every library
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition("@")
    place, _, at = rest.partition(":")
    if kind not in KINDS or place not in PLACES or ONLY_AT.get(kind, place) != place or not _counts(at or "1"):
        only = ", ".join(f"{kind} only @{place}" for kind, place in ONLY_AT.items())
        raise UserError(
            f"--inject={text}: expected KIND@PLACE:N, KIND one of {', '.join(KINDS)}, PLACE one of {', '.join(PLACES)} "
            f"({only}), N 1 or more; for example kill@save:3"
        )
    return Fault(kind, place, int(at or "1"))


def _counts(text: str) -> bool:
    return text.isdecimal() and int(text) >= 1
