"""Config files and command-line overrides, with errors that name the nearest match.

A config file is a Python file with `get_config() -> ConfigDict`. Those of stages take an argument, the variant, which
is named behind a colon: `configs/stages/code.py:small`. An override is `--config.section.key=value`, read as
the type that the key has.
"""

from __future__ import annotations

import ast
import difflib
import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, from_config_dict, nearest, to_dict

PREFIX = "--config."


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments as (others, overrides); `--config.key value` is joined to `--config.key=value`."""
    others, overrides = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(PREFIX):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            value = next(waiting, None)
            if value is None:
                raise UserError(f"{argument} needs a value: {argument}=...")
            overrides.append(f"{argument}={value}")
    return others, overrides


def load_config(path: str, overrides: list[str]) -> Config:
    """The validated config of a file with `overrides` applied. Raises UserError naming what is wrong with which."""
    return _overridden(read_config_file(path), overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """A config with `overrides` applied. Raises UserError naming what is wrong with which."""
    return _overridden(ConfigDict(to_dict(config)), overrides)


def _overridden(values: ConfigDict, overrides: list[str]) -> Config:
    for override in overrides:
        key, _, text = override.removeprefix(PREFIX).partition("=")
        _set(values, key, text)
    return from_config_dict(values)


def read_config_file(path: str) -> Any:
    """The ConfigDict of a config file, `PATH` or `PATH:ARGUMENT`. Raises UserError where the file is missing, fails, or
    gives no ConfigDict.
    """
    path, colon, argument = path.partition(":")
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        known = known or sorted(str(p) for p in Path("configs").glob("*.py"))
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else "python -m smallcoder_jax.main --list names those that exist"
        raise UserError(f"config file '{path}' does not exist; {hint}")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        values = get_config(*([argument] if colon else [])) if get_config else None
    except UserError:
        raise
    except Exception as error:  # the user's own program, which may raise anything
        raise UserError(f"config file '{path}': {type(error).__name__}: {error}") from error
    if get_config is None:
        raise UserError(f"config file '{path}' has no get_config()")
    if not isinstance(values, ConfigDict):
        raise UserError(
            f"config file '{path}': get_config() returns {type(values).__name__}; expected a ConfigDict: begin with "
            "smallcoder_jax.config.default_config(), change it and return it"
        )
    return values


def _set(values: ConfigDict, key: str, text: str) -> None:
    section: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = list(section.keys())
        if part not in known:
            raise UserError(f"unknown config key '{key}'; {nearest(part, known)}")
        is_section = isinstance(section[part], ConfigDict)
        if is_section != (depth < len(parts) - 1):
            inside = f"a section with {', '.join(section[part].keys())}" if is_section else "a value, not a section"
            raise UserError(f"config key '{'.'.join(parts[: depth + 1])}' is {inside}")
        if is_section:
            section = section[part]
    section[parts[-1]] = _parse(section[parts[-1]], text, key)


def _parse(current: Any, text: str, key: str) -> Any:
    if isinstance(current, str):
        return text
    wanted = type(current).__name__
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"--config.{key}={text}: expected {wanted}") from error
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e4 steps
    if isinstance(current, tuple | list) and isinstance(value, tuple | list):
        return tuple(value)
    if type(value) is not type(current):
        raise UserError(f"--config.{key}={text}: expected {wanted}, got {type(value).__name__}")
    return value
