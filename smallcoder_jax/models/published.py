"""How the models of a family are published: the names and shapes of their tensors, and the fields of their config.json.

`huggingface` reads and writes the files; a family says what is in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig

ParamPath = tuple[str | int, ...]
_LIMITS = {int: (1, 2**31 - 1), float: (0, 1e30)}  # of the numbers in config.json


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Published tensor `name` holds the parameters at `ours`, side by side along their last axis, transposed or not.

    Ours are [in, out]; torch's Linear is [out, in].
    """

    name: str
    ours: tuple[ParamPath, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of a config.json, with errors that name it."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; where it is absent or null `default`, and without one a UserError."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{self.path}: {key} is {shown(value)}; expected a value of type {kind.__name__}")
        if kind in _LIMITS and not _LIMITS[kind][0] <= value <= _LIMITS[kind][1]:
            least, most = _LIMITS[kind]
            raise UserError(f"{self.path}: {key} is {shown(value)}; expected at least {least} and at most {most}")
        return float(value) if kind is float else value

    def insist(self, key: str, default: Any, *supported: Any) -> None:
        """Refuses what the model does not compute."""
        value = self.values.get(key, default)
        if value not in supported:
            raise UserError(f"{self.path}: {key} is {shown(value)}; supported: {', '.join(map(repr, supported))}")


@dataclasses.dataclass(frozen=True)
class Published:
    """What a family says of its files. The functions take the shape of a model first."""

    # The `model_type` that computes what this model computes. Raises UserError that names the fields in the way.
    model_type: Callable[[Any], str]
    readers: Mapping[str, Callable[[Settings], ModelConfig]]  # by model_type, from the fields of a config.json
    settings: Callable[[Any], dict[str, Any]]  # the fields of config.json, but those of the tokenizer
    tensors: Callable[[Any], list[Tensor]]  # together they hold every parameter exactly once
    shapes: Callable[[Any], dict[ParamPath, tuple[int, ...]]]  # of every parameter, by arithmetic, unrolled
    # (model, the weights, shapes of the tensors that they hold): our name of each tensor -> theirs. Old files have
    # other names, and hold what is computed and not learned. Raises UserError where they can be none of this model.
    stored: Callable[[Any, Path, Mapping[str, tuple[int, ...]]], dict[str, str]]
    tied: Callable[[Any], tuple[str, str] | None]  # a tensor that is the same as another, and that: files may have both
    describe: Callable[[Any], tuple[str, dict[str, str]]]  # for the model card: what it is, and rows of its table


def shown(value: Any) -> str:
    """A value of unknown length as a message shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
