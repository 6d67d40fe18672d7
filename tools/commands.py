"""The commands that an installation adds (`[project.scripts]`); each runs the `main` of a module."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from smallcoder_jax.base.errors import run_cli


def _command(module: str) -> Callable[[], None]:
    return lambda: run_cli(importlib.import_module(module).main)


train = _command("smallcoder_jax.main")
generate = _command("tools.generate")
export = _command("tools.export")
verify = _command("tools.verify_models")
prepare = _command("tools.prepare_data")
stages = _command("tools.run_stages")
variants = _command("tools.train_all_variants")
doctor = _command("tools.doctor")
launch = _command("launch.local")
