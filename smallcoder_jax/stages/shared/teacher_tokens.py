"""A teacher's most probable tokens at every position of a run's batches, computed once and stored on disk.

DIR/teachers/KEY/SIDE/00000000-00000016.npz    of batches 0 to 15: `ids` and `log_probs` [batches, B, T, K]

KEY is a hash of the teacher, the temperature, the data and their order. All runs on the same batches share the files,
and a run with more steps adds to them. Files are written completely or not at all, so an interrupted run continues
after the last one.

Shapes: B rows of a batch, T positions, K most probable tokens.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from smallcoder_jax.base.artifacts import full_disk_as_user_error, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, reason
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config
from smallcoder_jax.data.rows.prefetch import BatchIterator
from smallcoder_jax.data.tokens.shards import token_dtype
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import batch_sharding, make_mesh, on_mesh, params_sharding, place_batch
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.ops import precision
from smallcoder_jax.ops.divergence import top_tokens

Batch = dict[str, np.ndarray]
Score = Callable[[Mapping[str, np.ndarray]], Batch]

FORMAT = 1  # raised whenever the same settings give other files
# Errors of zipfile and numpy for a damaged archive, in addition to OSError, ValueError and KeyError.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, SyntaxError, tokenize.TokenError, struct.error)
FILE_BYTES = 64 << 20  # at most, unless a single batch is larger


def folder_of(config: Config, identity: Mapping[str, Any]) -> Path:
    """The folder of the tokens for an identity: the teacher, the temperature, the number of tokens and the batches."""
    key = short_key([FORMAT, dict(identity)])
    return Path(config.data.dir).expanduser() / "teachers" / key


def scorer(config: Config, teacher: LoadedModel) -> Score:
    """A function that maps a batch to the `ids` and `log_probs` [B, T, K] of the teacher's most probable tokens.

    The temperature is that of `distill`. The function processes a batch in microbatches on the run's mesh. Raises
    UserError for a mesh that splits rows.
    """
    if config.mesh.context != 1:
        raise UserError(f"{config.mesh.context=}: distill.top_k needs whole rows; set it to 1, or distill.top_k to 0")
    rows = config.train.microbatch_rows
    mesh = make_mesh(config.mesh, config.model, rows)
    graph, _ = build.abstract_model(teacher.model, teacher.compute)
    params = jax.device_put(teacher.params, params_sharding(mesh, teacher.params, family_of(teacher.model).sharding))
    distill, narrow = config.distill, token_dtype(config.model.vocab_size)

    def score(params: build.Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        guide = build.bind(graph, params)
        hidden_BTE = guide(batch["tokens"], batch["positions"], batch["segment_ids"]).states_BTD
        hidden_XE = hidden_BTE.reshape(-1, hidden_BTE.shape[-1])
        found = top_tokens(hidden_XE, guide.unembedding(), distill.top_k, distill.temperature)
        return jax.tree.map(lambda x_XK: x_XK.reshape(*hidden_BTE.shape[:2], -1), found)

    matmul = precision.choose(config.compute, mesh.devices.flat[0].platform)
    compiled = jax.jit(on_mesh(mesh, precision.multiplying(matmul.kind, score)))

    def of_batch(batch: Mapping[str, np.ndarray]) -> Batch:
        inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
        parts = []
        for start in range(0, len(batch["tokens"]), rows):
            part = {name: _filled(array[start : start + rows], rows) for name, array in inputs.items()}
            parts.append(jax.device_get(compiled(params, place_batch(batch_sharding(mesh), part))))
        ids, log_probs = (np.concatenate(arrays)[: len(batch["tokens"])] for arrays in zip(*parts, strict=True))
        return {"ids": ids.astype(narrow), "log_probs": log_probs.astype(np.float32)}

    return of_batch


class KeptTokens:
    """The tokens stored in a folder, `count` at each position of batches of `rows` rows of `length` tokens."""

    def __init__(self, folder: Path, *, rows: int, length: int, count: int):
        self._folder = folder
        self._shape = (rows, length, count)
        self._per_file = max(FILE_BYTES // (rows * length * count * 8), 1)

    def make(self, batches: Iterable[Mapping[str, np.ndarray]], score: Score, progress: Progress) -> None:
        """Writes the files for these batches that do not exist yet. Raises UserError when the disk is full."""
        begun = iter(batches)
        for first in itertools.count(0, self._per_file):
            group = list(itertools.islice(begun, self._per_file))
            if not group:
                return
            path = self._folder / f"{first:08d}-{first + len(group):08d}.npz"
            before = self._find(first)
            if before is None or before.name < path.name:
                progress.note(f"the teacher's most probable tokens, batches {first:,} to {first + len(group) - 1:,}")
                _write(path, [score(batch) for batch in group])
                if before is not None:  # written by a run with fewer steps
                    before.unlink(missing_ok=True)

    def read(self, first: int = 0) -> Iterator[Batch]:
        """Yields `teacher_ids` and `teacher_log_probs` [B, T, K] of batch `first` and all later ones. Raises UserError,
        naming the file, when one is damaged.
        """
        for start in itertools.count(first - first % self._per_file, self._per_file):
            path = self._find(start)
            if path is None:
                return
            ids, log_probs = _read(path, self._shape, self._per_file)
            for index in range(max(first - start, 0), len(ids)):
                yield {"teacher_ids": ids[index].astype(np.int32), "teacher_log_probs": log_probs[index]}

    def _find(self, first: int) -> Path | None:
        """The file that begins with batch `first`; the longest one, if a killed process left several."""
        return max(self._folder.glob(f"{first:08d}-*.npz"), default=None)


class WithTeacher:
    """Training batches with the teacher's tokens added. The state is that of the batches, and the number taken."""

    def __init__(self, batches: BatchIterator, kept: KeptTokens):
        self._batches, self._kept = batches, kept
        self._taken, self._reader = 0, kept.read()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = {**next(self._batches), **next(self._reader)}
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state after the batch returned last."""
        return {"batches": self._batches.get_state(), "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state that `get_state` returned."""
        self._batches.set_state(state["batches"])
        self._taken, self._reader = state["taken"], self._kept.read(state["taken"])

    def close(self) -> None:
        """Stops background work of the batches."""
        self._batches.close()


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` padded with rows of zeros to `rows` rows. Zeros are segment 0, which is padding."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def _write(path: Path, batches: list[Batch]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with full_disk_as_user_error(path.parent), temporary.open("wb") as file:
            ids, log_probs = (np.stack([batch[name] for batch in batches]) for name in ("ids", "log_probs"))
            np.savez(file, ids=ids, log_probs=log_probs)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, shape: tuple[int, ...], most: int) -> tuple[np.ndarray, np.ndarray]:
    """The `ids` and `log_probs` of at most `most` batches of this shape. The archive's own checksums are verified."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            ids, log_probs = (_array(archive, f"{name}.npy", shape, most) for name in ("ids", "log_probs"))
        if ids.dtype.kind not in "iu" or log_probs.dtype.kind != "f" or len(ids) != len(log_probs):
            raise ValueError(f"{len(ids)} of {ids.dtype} and {len(log_probs)} of {log_probs.dtype}")
    except (OSError, ValueError, KeyError, *DAMAGED) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}); delete it, and the same command creates it again"
        ) from error
    return ids, log_probs


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], most: int) -> np.ndarray:
    with archive.open(name) as file:
        major, _ = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        found, fortran_order, dtype = read_header(file)
        if found[1:] != shape or found[0] > most or fortran_order or dtype.hasobject:
            raise ValueError(f"{name} is {found} of {dtype}; expected up to {most} batches of {shape}")
        size = math.prod(found) * dtype.itemsize
        content = file.read(size + 1)  # one more byte, because the checksum is compared at the end of the file
        if len(content) != size:
            raise ValueError(f"{name} has {len(content):,} bytes, not {size:,}")
    return np.frombuffer(content, dtype).reshape(found)
