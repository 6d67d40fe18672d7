"""Batches of conversations for fine-tuning, packed by best fit or one per row. The loss counts the assistant's turns.

All conversations are in memory, because there are thousands, not billions. An epoch is therefore packed as a whole, and
the position in the data is an epoch and a batch.

Shapes: B rows of this process, T places of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.rows.packing import best_fit, fill_batch
from smallcoder_jax.tokenizers.chat import Encoded


class ConversationBatches:
    """Batches [B, T] with the keys of `packing.fill_batch`: the rows `rows` of global batches of `batch_size`.

    Conversations are packed, or one per row, and shuffled anew in every epoch. The batches are endless, or last for
    `num_epochs`; the last batch of an epoch is padded. Conversations longer than a row are dropped, because their end
    means little without their beginning; `dropped` is their number. Raises UserError where none is left.
    """

    def __init__(
        self,
        conversations: Sequence[Encoded],
        *,
        length: int,
        batch_size: int,
        rows: Sequence[int],
        pad_id: int,
        seed: int,
        packed: bool,
        num_epochs: int | None = None,
    ):
        self._fitting = [item for item in conversations if len(item) - 1 <= length and item.counted[1:].any()]
        self.dropped = len(conversations) - len(self._fitting)
        if not self._fitting:
            raise UserError(
                f"of {len(conversations)} conversations none fits a row of {length} tokens; raise "
                "train.sequence_length or give shorter ones"
            )
        self._length, self._batch_size, self._own, self._pad_id = length, batch_size, rows, pad_id
        self._seed, self._packed, self._num_epochs = seed, packed, num_epochs
        self._epoch, self._taken = 0, 0  # epoch, and how many of its batches were returned
        self._rows = self._pack()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._taken * self._batch_size >= len(self._rows):
            self._epoch, self._taken = self._epoch + 1, 0
            self._rows = self._pack()
        if self._num_epochs is not None and self._epoch >= self._num_epochs:
            raise StopIteration
        start = self._taken * self._batch_size
        rows = self._rows[start : start + self._batch_size]
        self._taken += 1
        mine = [rows[row] for row in self._own if row < len(rows)]
        return fill_counted(mine, len(self._own), self._length, self._pad_id)

    def get_state(self) -> dict[str, Any]:
        """The position after the batch returned last: small, JSON-serialisable and the same on all processes."""
        return {"epoch": self._epoch, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned for the same conversations and settings."""
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._rows = self._pack()

    def close(self) -> None:
        """Does nothing, because nothing runs in the background."""

    def _pack(self) -> list[list[Encoded]]:
        rng = np.random.default_rng((self._seed % 2**32, self._epoch))
        shuffled = [self._fitting[i] for i in rng.permutation(len(self._fitting))]
        if not self._packed:
            return [[item] for item in shuffled]
        packed = best_fit(shuffled, self._length)
        return [packed[i] for i in rng.permutation(len(packed))]


def fill_counted(rows: Sequence[Sequence[Encoded]], batch_size: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """As `packing.fill_batch`, with weight 1 where the target is a token that the loss counts and 0 elsewhere."""
    batch = fill_batch([[item.ids for item in row] for row in rows], batch_size, length, pad_id)
    for weights_T, row in zip(batch["loss_weights"], rows, strict=False):
        counted = np.concatenate([item.counted[1:] for item in row])  # for the targets, which are ids[1:]
        weights_T[: len(counted)] = counted
    return batch
