"""Modules that have moved, under the names that they had: `python -m tools.bench_step` and imports go on working."""

from __future__ import annotations

import importlib
import sys

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import run_cli


def moved(old: str, new: str) -> None:
    """Makes the module `new` the one that is imported as `old`; where `old` is the program, runs it and names `new`."""
    module = importlib.import_module(new)
    if old == "__main__":
        say(f"this command is now: python -m {new}", sys.stderr)
        run_cli(module.main)
    sys.modules[old] = module
