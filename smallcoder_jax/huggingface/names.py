"""Converts between our parameters and the tensors of published files, as defined by the family of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.huggingface import packed as packing
from smallcoder_jax.models import build
from smallcoder_jax.models.families import published
from smallcoder_jax.models.published import ParamPath, Tensor


def to_published(model: ModelConfig, params: build.Params, *, packed: bool = False) -> dict[str, np.ndarray]:
    """Converts unrolled parameters to named tensors, with ternary kernels `packed` or as they are. Raises UserError
    when `params` do not fit `model`.
    """
    told, given = published(model), _flatten(params)
    shapes = told.shapes(model)
    if missing := sorted(map(_text, shapes.keys() - given.keys())):
        raise UserError(f"parameters lack {_some(missing)}; expected those of {model}")
    if unknown := sorted(map(_text, given.keys() - shapes.keys())):
        raise UserError(f"parameters hold {_some(unknown)}, which {model} does not have")
    found = {}
    for tensor in told.tensors(model):
        parts = [np.asarray(given[path]) for path in tensor.ours]
        for path, part in zip(tensor.ours, parts, strict=True):
            if part.shape != shapes[path]:
                raise UserError(f"parameter {_text(path)} has shape {part.shape}; expected {shapes[path]}")
        if packed and tensor.ternary:
            found |= packing.pack(tensor.name, parts[0])
            continue
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        found[tensor.name] = np.ascontiguousarray(joined.T if tensor.transposed else joined)
    return found


def ternary(model: ModelConfig) -> set[str]:
    """The names of the tensors that can be packed."""
    return {tensor.name for tensor in published(model).tensors(model) if tensor.ternary}


def check_packable(model: ModelConfig) -> None:
    """Raises UserError when no layer of the model has ternary weights."""
    if not ternary(model):
        raise UserError("only ternary weights can be packed, and this model has none; export it with --weights=float")


def from_published(
    model: ModelConfig,
    where: Path,
    held: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    packed: bool = False,
) -> build.Params:
    """Converts named tensors to unrolled parameters.

    `held` maps the names of all tensors of the weights in `where` to their shapes, and `read` returns the values of
    one. Ternary kernels are `packed` or as they are. The settings in config.json are compared with `held` before
    anything is built or read. Raises UserError that names tensors that are missing, unknown or of another shape, a
    packed one that holds something else, or a head that differs from its tied embedding.
    """
    told = published(model)
    stored = told.stored(model, where, held)
    wanted, expected = told.tensors(model), told.shapes(model)
    shapes = {name: shape for tensor in wanted for name, shape in _published_shapes(tensor, expected, packed)}
    names, (head, table) = shapes.keys(), told.tied(model) or ("", "")
    if missing := sorted(names - stored.keys()):
        raise UserError(f"{where} lacks {_some(missing)}, which its config.json says it holds")
    if unknown := sorted(stored.keys() - names - {head}):
        raise UserError(f"{where} holds {_some(unknown)}, which no {told.model_type(model)} of its config.json has")
    for name, shape in shapes.items():
        if held[stored[name]] != shape:
            raise UserError(f"{where}: tensor {name} has shape {held[stored[name]]}; expected {shape}")
    if head in stored.keys() - names:
        _check_tied(where, held, read, stored[head], stored[table])
    params: build.Params = {}
    for tensor in wanted:
        if packed and tensor.ternary:
            _insert(params, tensor.ours[0], _unpacked(tensor, expected, where, read))
            continue
        value = read(stored[tensor.name])
        value = value.T if tensor.transposed else value
        borders = np.cumsum([expected[path][-1] for path in tensor.ours])[:-1]
        for path, part in zip(tensor.ours, np.split(value, borders, axis=-1), strict=True):
            _insert(params, path, np.ascontiguousarray(part))
    return params


def _check_tied(
    where: Path, held: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], head: str, table: str
) -> None:
    """Raises UserError when the file holds a head that differs from the embedding that it should be tied to."""
    if held[head] != held[table] or not np.array_equal(read(head), read(table), equal_nan=True):
        raise UserError(
            f"{where}: {head} differs from {table}, but its config.json says that the two are tied; set "
            "tie_word_embeddings to false there if the model has a head of its own"
        )


def _published_shapes(
    tensor: Tensor, shapes: Mapping[ParamPath, tuple[int, ...]], packed: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors by which `tensor` is stored, with their shapes."""
    parts = [shapes[path] for path in tensor.ours]
    if packed and tensor.ternary:
        return [(tensor.name, packing.packed_shape(parts[0])), (tensor.name + packing.SUM, ())]
    joined = (*parts[0][:-1], sum(part[-1] for part in parts))
    return [(tensor.name, joined[::-1] if tensor.transposed else joined)]


def _unpacked(
    tensor: Tensor, shapes: Mapping[ParamPath, Any], where: Path, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    codes, total = read(tensor.name), float(read(tensor.name + packing.SUM))
    try:
        return packing.unpack(tensor.name, codes, total, shapes[tensor.ours[0]])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _flatten(params: build.Params) -> dict[ParamPath, Any]:
    flat: dict[ParamPath, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        flat[tuple(keys)] = leaf
    return flat


def _insert(params: build.Params, path: ParamPath, value: np.ndarray) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def _text(path: ParamPath) -> str:
    return "/".join(map(str, path))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
