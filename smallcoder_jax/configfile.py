"""Config files and command-line overrides, with errors that name the nearest match.

A config file is a Python file with `get_config() -> ConfigDict`, or the `config.json` of a run. The config files of
stages take the variant as an argument after a colon: `configs/stages/code.py:small`. An override is
`--config.section.key=value`; the value is parsed as the type of the key.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_bytes, read_json_object
from smallcoder_jax.config import Config, build, from_config_dict, nearest, to_dict
from smallcoder_jax.config.fields import shown

PREFIX = "--config."
PROJECT = Path(__file__).resolve().parents[1]  # the folder that holds the package and configs/
TABLES = ("bytes", "smallcoder")  # files of `configs/` in which variants are declared
MAX_BYTES = 1 << 20  # the largest config file that is read


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
    """The validated config of a file with `overrides` applied. Raises UserError that says which of them is wrong, and
    how."""
    values = read_config_file(path)
    for override in overrides:
        key, _, text = override.removeprefix(PREFIX).partition("=")
        _set(values, key, text)
    return from_config_dict(values)


def read_config_file(path: str) -> Any:
    """All values of a config file, `PATH` or `PATH:ARGUMENT`, as a ConfigDict. Where the working directory has no such
    file, the project's own `configs/` is searched too. There the bare name is enough, such as `medium_lc`.

    Raises UserError where the file is missing, fails, or returns anything but keys and values of the schema.
    """
    file, argument = _find(path)
    named = f"config file '{file}'"
    if file.suffix == ".json":
        if argument is not None:
            raise UserError(f"{named} is JSON and takes no argument; leave ':{argument}' out")
        values = read_json_object(file, "the config of a run", MAX_BYTES)
    else:
        values = _run(file, argument, named)
    try:
        return ConfigDict(to_dict(build(values)))
    except UserError as error:
        raise UserError(f"{named}: {error}") from error


def beside(file: str, path: str) -> Callable[[], Any]:
    """A `get_config` for the config file `file` that returns the config of another file in the same folder: `path`, as
    `NAME` or `NAME:ARGUMENT`."""
    return lambda: read_config_file(str(Path(file).with_name(path)))


def _find(path: str) -> tuple[Path, str | None]:
    """The file of `PATH` or `PATH:ARGUMENT`, and the argument or None. Raises UserError where there is no such file."""
    before, colon, behind = path.rpartition(":")
    for name, argument in ((path, None), *([(before, behind)] if colon else [])):
        for file in (Path(name), PROJECT / name, config_folder() / f"{name}.py", PROJECT / "configs" / f"{name}.py"):
            if os.path.lexists(file) and not file.is_dir():
                return file, argument
    wanted = Path(before or path)
    folder = wanted.parent if wanted.parent != Path() and os.path.isdir(wanted.parent) else config_folder()
    close = difflib.get_close_matches(_key(wanted), [_key(file) for file in config_files(folder)], n=1, cutoff=0.5)
    meant = [str(file) for file in config_files(folder) if _key(file) in close]
    hint = f"did you mean '{meant[0]}'?" if meant else "python -m smallcoder_jax.main --list names those that exist"
    what = "is a folder" if os.path.isdir(path) else "does not exist"
    raise UserError(f"config file '{path}' {what}; {hint}")


def config_folder() -> Path:
    """The project's `configs/`: in the working directory, or else next to the package."""
    return Path("configs") if os.path.isdir("configs") else PROJECT / "configs"


def config_files(folder: Path) -> list[Path]:
    """The config files in a folder, without the tables from which this project's configs are made."""
    return sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", *TABLES))


def _key(path: Path) -> str:
    """The short name of a config: 'tiny_lc' for configs/tiny_lc.py and for the model name SmallCoder-Tiny-LC."""
    return path.name.removesuffix(".py").lower().replace("-", "_").removeprefix("smallcoder_")


def _run(file: Path, argument: str | None, named: str) -> dict[str, Any]:
    """The values that `get_config` of a Python file returns. The file is the user's program and may do anything."""
    read_bytes(file, "a config file: Python with get_config()", MAX_BYTES)
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise UserError(f"{named} has no get_config()")
        if argument is not None and not inspect.signature(get_config).parameters:
            raise UserError(f"{named} takes no argument; leave ':{argument}' out")
        values = get_config(*([] if argument is None else [argument]))
        if isinstance(values, ConfigDict):
            return values.to_dict()
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(
            f"{named} ends the program, with sys.exit({shown(error.code)}); expected a get_config() that "
            "returns a ConfigDict"
        ) from error
    except BaseException as error:
        raise UserError(f"{named}: {type(error).__name__}: {_words(error)}") from error
    raise UserError(
        f"{named}: get_config() returns {type(values).__name__}; expected a ConfigDict: begin with "
        "smallcoder_jax.config.default_config(), change it and return it"
    )


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "an error that cannot be shown"


def _set(values: ConfigDict, key: str, text: str) -> None:
    section: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = list(section.keys())
        if part not in known:
            leaves = [
                f"{name}.{leaf}" for name in known if isinstance(section[name], ConfigDict) for leaf in section[name]
            ]
            raise UserError(f"unknown config key '{key}'; {nearest(part, known + leaves * (len(parts) == 1))}")
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
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"--config.{key}: the integer is too large for a float") from None
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(value, float) and value.is_integer():
        value = int(value)  # such as 1e4 for steps
    if isinstance(current, tuple | list) and isinstance(value, tuple | list):
        return tuple(value)
    if type(value) is not type(current):
        raise UserError(f"--config.{key}={text}: expected {wanted}, got {type(value).__name__}")
    return value
