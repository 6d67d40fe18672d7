"""Keeps modules that have moved available under their former names, such as `python -m tools.bench_step`."""

from __future__ import annotations

import importlib
import sys

from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import run_cli


def moved(old: str, new: str) -> None:
    """Makes `import old` give the module `new`. If `old` was started as the program, says so and runs `new`."""
    module = importlib.import_module(new)
    if old == "__main__":
        say(f"this command is now: python -m {new}", sys.stderr)
        run_cli(module.main)
    sys.modules[old] = module
