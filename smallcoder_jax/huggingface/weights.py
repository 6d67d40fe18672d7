"""Reads the weights of a published folder: `model.safetensors`, or several such files with an index.

The files are not trusted. Only regular files of the folder itself are opened, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from smallcoder_jax.base import files
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.huggingface import names
from smallcoder_jax.huggingface import packed as packing
from smallcoder_jax.models import build

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
_PACKED = "U8"  # four ternary weights
_PICKLES = ("bin", "pt", "pth", "ckpt")


class _File(NamedTuple):
    """One of the files, opened. Its header is read and checked, but none of its tensors."""

    path: Path
    file: Any


def digest(folder: Path) -> str:
    """The SHA-256 of the weights in hex: of the single file, or of the digests of several files ordered by name."""
    _, places = _find(folder)
    digests = []
    for path in sorted({folder / WEIGHTS} if places is None else set(places.values())):
        with contextlib.ExitStack() as stack:
            _open(path, stack)  # checks the size against the header, so that an inflated file is not read for hours
        try:
            digests.append(files.sha256(path))
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise UserError(f"{path} cannot be read: {files.reason(error)}. Export or download it again") from error
    return digests[0] if places is None else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read(folder: Path, model: ModelConfig, *, packed: bool = False) -> build.Params:
    """The unrolled float32 parameters of `model`, whose ternary kernels are `packed` or as they are.

    Raises UserError that names the file and the tensor when a tensor is missing, unknown, duplicated, of another shape
    or type, or in another file than the index says, and when a file is damaged.
    """
    where, places = _find(folder)
    with contextlib.ExitStack() as stack:
        opened = [_open(path, stack) for path in ([where] if places is None else sorted(set(places.values())))]
        holders: dict[str, _File] = {}
        for each in opened:
            for name in sorted(each.file.keys()):
                if name in holders:
                    raise UserError(f"{where}: tensor {name} is in {holders[name].path.name} and {each.path.name}")
                holders[name] = each
        if places is not None:
            _check_places(where, places, holders)
        held = {name: tuple(each.file.get_slice(name).get_shape()) for name, each in holders.items()}

        def values(name: str) -> np.ndarray:
            path, file = holders[name]
            dtype = file.get_slice(name).get_dtype()
            wanted = (_PACKED,) if packed and name + packing.SUM in held else _DTYPES
            if dtype not in wanted:
                raise UserError(f"{path}: tensor {name} is {dtype}; supported: {', '.join(wanted)}")
            tensor = file.get_tensor(name)
            return tensor if dtype == _PACKED else tensor.astype(np.float32)

        return names.from_published(model, where, held, values, packed=packed)


def _find(folder: Path) -> tuple[Path, dict[str, Path] | None]:
    """The single file, or the index with the file of each tensor. Raises UserError when there is neither."""
    index = folder / INDEX
    if os.path.exists(folder / WEIGHTS):
        return folder / WEIGHTS, None
    if os.path.exists(index):
        return index, _read_index(index)
    pickles = sorted(file.name for suffix in _PICKLES for file in folder.glob(f"*.{suffix}"))
    parts = sorted(file.name for file in folder.glob("*.safetensors*"))
    if pickles:
        found = f"{pickles[0]} is there, but a pickle can run any code and is never opened"
    elif parts:
        found = f"{', '.join(parts[:2])} is there, but no {INDEX}, which says what is in which file"
    else:
        found = "there are no weights"
    raise UserError(f"{folder / WEIGHTS} does not exist: {found}. Save it as {WEIGHTS}, or as parts with {INDEX}")


def _read_index(path: Path) -> dict[str, Path]:
    places = files.read_json_object(path, "an index of weights; download the model again").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} has no weight_map, which says what is in which file; download the model again")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} says that {name} is in {file!r}; expected the name of a .safetensors file there")
    return {name: path.parent / file for name, file in places.items()}


def _open(path: Path, stack: contextlib.ExitStack) -> _File:
    try:
        files.open_regular(path).close()  # refuses a pipe, for which the code below would wait
        return _File(path, stack.enter_context(safetensors.safe_open(path, framework="numpy")))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, which {INDEX} names; download the model again") from error
    except (OSError, ValueError, MemoryError) as error:  # MemoryError: the whole file is mapped
        raise UserError(f"{path} cannot be read: {files.reason(error)}. Export or download the model again") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}. Export or download it again") from error


def _check_places(index: Path, places: dict[str, Path], holders: dict[str, _File]) -> None:
    """Raises UserError unless every tensor is where the index says, and the files hold no others."""
    elsewhere = sorted(name for name, path in places.items() if name not in holders or holders[name].path != path)
    if elsewhere:
        name = elsewhere[0]
        found = f"it is in {holders[name].path.name}" if name in holders else "no file holds it"
        raise UserError(f"{index} says that {name} is in {places[name].name}, but {found}; download the model again")
    if unlisted := sorted(holders.keys() - places.keys()):
        name = unlisted[0]
        raise UserError(f"{holders[name].path} holds {name}, which {INDEX} does not list; download the model again")
