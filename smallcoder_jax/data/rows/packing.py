"""Packs documents into rows of a fixed length.

A packer reads documents (1-D arrays of ids, BOS first and EOS last) and returns rows. A row is a list of pieces. A
piece of n + 1 ids takes n places of the row: the inputs are `ids[:-1]` and the targets `ids[1:]`. Consecutive pieces of
one document share the id between them, so that every id but the first is a target exactly once.

The state of a packer is the state of its documents at a point before its buffer, and the progress since that point.

Shapes: B rows, T places of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence, Sized
from typing import Any, Protocol, TypeVar

import numpy as np

from smallcoder_jax.base.errors import UserError

Row = list[np.ndarray]
_Piece = TypeVar("_Piece", bound=Sized)  # a piece of n + 1 ids

WINDOW_ROWS = 64  # best fit: documents for this many rows are arranged together
SHUFFLED_ROWS, SHUFFLED_PLACES = 256, 1 << 21  # most that are shuffled together; a resume rereads them in under 1 s


class Documents(Protocol):
    """An iterator over documents whose position can be saved and restored."""

    def __next__(self) -> np.ndarray: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Packer(Protocol):
    def next_row(self) -> Row: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class ConcatPacker:
    """Packs documents one after the other and cuts them where a row ends. Only the very last row is not full."""

    def __init__(self, documents: Documents, length: int):
        self._documents = documents
        self._length = length
        self._ids: np.ndarray | None = None  # a document that is partly used
        self._offset = 0  # how much of it is used
        self._before: dict[str, Any] = {}  # the state from which a resume reads it again

    def next_row(self) -> Row:
        """The next row. Raises StopIteration after the last."""
        row: Row = []
        free = self._length
        while free:
            if self._ids is None:
                self._before = self._documents.get_state()
                self._ids = next(self._documents, None)
            if self._ids is None:
                break
            piece = self._ids[self._offset : self._offset + free + 1]
            if len(piece) > 1:
                row.append(piece)
                free -= len(piece) - 1
                self._offset += len(piece) - 1
            if self._offset + 1 >= len(self._ids):
                self._ids, self._offset = None, 0
        if not row:
            raise StopIteration
        return row

    def get_state(self) -> dict[str, Any]:
        documents = self._documents.get_state() if self._ids is None else self._before
        return {"documents": documents, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._before, self._offset = state["documents"], state["offset"]
        self._ids = next(self._documents) if self._offset else None


class DocumentPacker:
    """Makes one row of each document: its beginning. A document with fewer than `min_tokens` tokens (not counting BOS
    and EOS) is unusable and skipped; `max_unusable` of them in a row are an error.
    """

    def __init__(self, documents: Documents, length: int, min_tokens: int, max_unusable: int):
        self._documents = documents
        self._length = length
        self._min_tokens, self._max_unusable = min_tokens, max_unusable

    def next_row(self) -> Row:
        """The next row. Raises StopIteration after the last, and UserError after too many consecutive unusable ones."""
        for _ in range(self._max_unusable):
            ids = next(self._documents)
            if is_usable(ids, self._min_tokens):
                return [ids[: self._length + 1]]
        raise UserError(
            f"{self._max_unusable} documents in a row were unusable: each has fewer than {self._min_tokens} tokens. "
            "Look at the data (python -m tools.validate_data), lower data.min_tokens or raise data.max_unusable"
        )

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._documents.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])


def is_usable(ids: np.ndarray, min_tokens: int) -> bool:
    """Whether a document has at least `min_tokens` tokens in addition to BOS and EOS."""
    return len(ids) - 2 >= min_tokens


class ShuffledRows:
    """The rows of another packer in random order within windows of at most `SHUFFLED_ROWS` rows and `SHUFFLED_PLACES`
    places.

    A long document fills many consecutive rows. Without shuffling, a batch would hold one document, not a sample of
    all. The state is the packer's state before the window, and how many rows of the window were used.
    """

    def __init__(self, packer: Packer, length: int, seed: Sequence[int]):
        self._packer = packer
        self._window_rows = max(1, min(SHUFFLED_ROWS, SHUFFLED_PLACES // length))
        self._seed = tuple(seed)
        self._window = 0  # the number of the current window, from 1
        self._before = packer.get_state()
        self._rows: list[Row] = []
        self._taken = 0

    def next_row(self) -> Row:
        """The next row. Raises StopIteration after the last."""
        if self._taken == len(self._rows):
            self._window += 1
            self._load_window()
            if not self._rows:
                raise StopIteration
        self._taken += 1
        return self._rows[self._taken - 1]

    def _load_window(self) -> None:
        self._before = self._packer.get_state()
        rows: list[Row] = []
        while len(rows) < self._window_rows:
            try:
                rows.append(self._packer.next_row())
            except StopIteration:
                break
        order = np.random.default_rng((*self._seed, self._window)).permutation(len(rows))
        self._rows, self._taken = [rows[i] for i in order], 0

    def get_state(self) -> dict[str, Any]:
        return {"packer": self._before, "window": self._window, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state["packer"])
        self._before, self._window, self._rows = state["packer"], state["window"], []
        if self._window:
            self._load_window()
        self._taken = state["taken"]


class BestFitPacker:
    """Packs by best fit decreasing within windows of `WINDOW_ROWS`. Only documents longer than a row are cut, into full
    rows and a rest. The rows of a window are ordered from long pieces to short ones, so that `ShuffledRows` is needed.
    """

    def __init__(self, documents: Documents, length: int):
        self._documents = documents
        self._length = length
        self._before = documents.get_state()  # the state from which the window is read again
        self._rows: list[Row] = []
        self._taken = 0

    def next_row(self) -> Row:
        """The next row. Raises StopIteration after the last."""
        if self._taken == len(self._rows):
            self._load_window()
            if not self._rows:
                raise StopIteration
        self._taken += 1
        return self._rows[self._taken - 1]

    def _load_window(self) -> None:
        self._before = self._documents.get_state()
        pieces: Row = []
        wanted = self._length * WINDOW_ROWS
        while wanted > 0 and (ids := next(self._documents, None)) is not None:
            pieces += [ids[start : start + self._length + 1] for start in range(0, len(ids) - 1, self._length)]
            wanted -= len(ids) - 1
        self._rows, self._taken = best_fit(pieces, self._length), 0

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._before, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._before, self._rows = state["documents"], []
        if state["taken"]:
            self._load_window()
        self._taken = state["taken"]


def best_fit(pieces: Sequence[_Piece], length: int) -> list[list[_Piece]]:
    """Packs pieces into rows of `length` places: the longest piece first, each into the row where it leaves the fewest
    places free."""
    rows: list[list[_Piece]] = []
    open_rows: list[tuple[int, int]] = []  # (free places, row), ascending
    for piece in sorted(pieces, key=len, reverse=True):
        places = len(piece) - 1
        found = bisect.bisect_left(open_rows, (places, -1))
        if found < len(open_rows):
            free, row = open_rows.pop(found)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if free > places:
            bisect.insort(open_rows, (free - places, row))
    return rows


def fill_batch(rows: Sequence[Row], batch_size: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The batch [B, T] of up to `batch_size` rows: tokens, targets, positions, segment_ids (int32), loss_weights.

    Positions restart in every piece, and segment ids number the pieces of a row from 1. Everything else is padding:
    `pad_id`, position 0, segment 0, weight 0.
    """
    shape = (batch_size, length)
    tokens_BT = np.full(shape, pad_id, np.int32)
    targets_BT = np.full(shape, pad_id, np.int32)
    positions_BT = np.zeros(shape, np.int32)
    segment_ids_BT = np.zeros(shape, np.int32)
    loss_weights_BT = np.zeros(shape, np.float32)
    places = np.arange(length, dtype=np.int32)
    for index, row in enumerate(rows):
        start = 0
        for segment, ids in enumerate(row, 1):
            end = start + len(ids) - 1
            tokens_BT[index, start:end] = ids[:-1]
            targets_BT[index, start:end] = ids[1:]
            positions_BT[index, start:end] = places[: end - start]
            segment_ids_BT[index, start:end] = segment
            start = end
        loss_weights_BT[index, :start] = 1.0
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "positions": positions_BT,
        "segment_ids": segment_ids_BT,
        "loss_weights": loss_weights_BT,
    }
