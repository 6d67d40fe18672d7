"""The published format of a family: the names and shapes of its tensors, and the fields of its config.json.

`huggingface` reads and writes the files; the family defines their content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax import Array

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig

ParamPath = tuple[str | int, ...]
_LIMITS = {int: (1, 2**31 - 1), float: (0, 1e30)}  # smallest and largest number allowed in config.json, by type


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The published tensor `name` holds the parameters at `ours`, concatenated along their last axis.

    Our kernels are [in, out]. torch's Linear is [out, in], and then `transposed` is true. `ternary` says that it is the
    kernel of a ternary layer (`ops.ternary`), which can be stored packed.
    """

    name: str
    ours: tuple[ParamPath, ...]
    transposed: bool = False
    ternary: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of a config.json. Errors name the file."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None, *, least: int | None = None) -> Any:
        """The value of `key`, or `default` when it is absent or null. Whole numbers are at least `least`, or 1.

        Raises UserError when there is neither, and for a value of another type or out of range.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{self.path}: {key} is {shown(value)}; expected a value of type {kind.__name__}")
        low, high = _LIMITS.get(kind, (None, None))
        low = low if least is None else least
        if low is not None and high is not None and not low <= value <= high:
            raise UserError(f"{self.path}: {key} is {shown(value)}; expected at least {low} and at most {high}")
        return float(value) if kind is float else value

    def insist(self, key: str, default: Any, *supported: Any) -> None:
        """Raises UserError when the value of `key` is not one of `supported`, those that the model can compute."""
        value = self.values.get(key, default)
        if value not in supported:
            raise UserError(f"{self.path}: {key} is {shown(value)}; supported: {', '.join(map(repr, supported))}")


@dataclasses.dataclass(frozen=True)
class Published:
    """The published format of a family. Every function but the `readers` takes the config of a model first."""

    # The `model_type` of transformers that computes the same function. Raises UserError that names the fields for which
    # there is none.
    model_type: Callable[[Any], str]
    readers: Mapping[str, Callable[[Settings], ModelConfig]]  # by model_type: the fields of config.json -> the config
    settings: Callable[[Any], dict[str, Any]]  # the fields of config.json, except those of the tokenizer
    tensors: Callable[[Any], list[Tensor]]  # together they hold every parameter exactly once
    shapes: Callable[[Any], dict[ParamPath, tuple[int, ...]]]  # of every unrolled parameter, computed from the config
    # (model, file of weights, shapes of its tensors by name) -> for the published name of each tensor, its name in the
    # file: old files use other names, and also hold tensors that are not parameters. Raises UserError when the file
    # cannot hold this model.
    stored: Callable[[Any, Path, Mapping[str, tuple[int, ...]]], dict[str, str]]
    tied: Callable[[Any], tuple[str, str] | None]  # the names of two tied tensors; a file may hold both
    describe: Callable[[Any], tuple[str, dict[str, str]]]  # for the model card: a phrase, and rows of its table
    # Python files that every export brings with it, for models that no architecture of transformers computes. The
    # `settings` name their classes in `auto_map`.
    code: tuple[Path, ...] = ()
    # For models that decide, by rounding activations or by borders between chunks: (module, ids, positions, segment
    # ids) -> hidden states, and the masks that the code returns as `boundaries`. A difference in the last bit can turn
    # a decision and from there on everything, so such models are compared in float64.
    decide: Callable[[Any, Array, Array, Array], tuple[Array, Sequence[Array]]] | None = None


def shown(value: Any) -> str:
    """The `repr` of a value for a message, truncated when it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
