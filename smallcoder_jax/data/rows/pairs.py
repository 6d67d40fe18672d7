"""Batches of preferences: a row holds several pairs twice, with their chosen and with their rejected answers.

Unlike in rows of documents, every id is an input. That includes the id that ends the answer, where the reward is read.

Shapes: R rows, 2 chosen and rejected answers, S slots for pairs, T places, P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.preferences.pair import Answer, Preference, Prompt
from smallcoder_jax.data.rows.packing import best_fit
from smallcoder_jax.tokenizers.base import TOOL_PIECES, Tokenizer
from smallcoder_jax.tokenizers.chat import Conversation, Encoded, Message, ToolCall, encode


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """Prompt and answer as ids, for both answers. `counted` marks the ids of the answer, including its end."""

    chosen: Encoded
    rejected: Encoded
    criteria: str

    @property
    def places(self) -> int:
        """The number of places of a row that the pair takes."""
        return max(len(self.chosen), len(self.rejected))


def encode_pairs(pairs: Iterable[Preference], tokenizer: Tokenizer) -> list[EncodedPair]:
    """The ids of every pair. Raises UserError for a tokenizer without a special piece that a conversation needs."""
    found = []
    for pair in pairs:
        prompt = prompt_ids(pair.prompt, tokenizer)
        chosen, rejected = (_joined(prompt, answer_ids(answer, tokenizer)) for answer in (pair.chosen, pair.rejected))
        found.append(EncodedPair(chosen, rejected, pair.criteria))
    return found


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The ids that a model continues with its answer: BOS and the text, or the conversation and the header of the
    assistant's turn."""
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return encode(prompt, tokenizer, reply=True).ids.tolist()


def answer_ids(answer: Answer, tokenizer: Tokenizer) -> list[int]:
    """The ids after a prompt: a text up to EOS, or a reply up to `<|im_end|>`. For well-formed calls they are the ids
    of `chat.encode`."""
    if isinstance(answer, str):
        return [*tokenizer.encode(answer), tokenizer.eos_id]
    # The template renders a turn with the same number of empty calls, whose content the texts of the calls replace.
    turn = Message("assistant", answer.content, (ToolCall("", {}),) * len(answer.calls))
    whole = encode(Conversation((Message("user"), turn)), tokenizer)
    start, stop = (tokenizer.specials.get(piece) for piece in TOOL_PIECES[:2])
    ids: list[int] = []
    calls, inside = iter(answer.calls), False
    for i in whole.ids[whole.counted].tolist():
        inside = inside and i != stop
        if not inside:
            ids.append(i)
        if i == start:
            ids += tokenizer.encode(f"\n{next(calls)}\n")
            inside = True
    return ids


def fitting(pairs: Sequence[EncodedPair], length: int) -> list[EncodedPair]:
    """The pairs of which both answers fit a row. Others are dropped, because no preference is known for a part of an
    answer. Raises UserError where none is left."""
    kept = [pair for pair in pairs if pair.places <= length]
    if not kept:
        raise UserError(
            f"of {len(pairs)} pairs none fits a row of {length} tokens; raise train.sequence_length or give shorter "
            "ones"
        )
    return kept


class PairBatches:
    """Batches of pairs: the rows `rows` of global batches of `batch_size`, packed and shuffled anew in every epoch.

    A row holds pairs in up to S slots, the most that can fit. `tokens`, `targets`, `positions`, `segment_ids` (the
    number of the slot from 1, and 0 on padding) and `loss_weights` (1 where the target belongs to the answer) are
    [R, 2, T]. `ends` [R, 2, S] holds the places of the answers' last tokens, and `pair_weights` [R, S] is 0 where a
    slot is empty. `columns` are numbers [P, k] for the P pairs, which the batches hold as [R, S, k]. The batches are
    endless, or last for `num_epochs`; the last batch of an epoch is padded. All pairs have to fit (see `fitting`).
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        *,
        length: int,
        batch_size: int,
        rows: Sequence[int],
        pad_id: int,
        seed: int,
        columns: Mapping[str, np.ndarray],
        num_epochs: int | None = None,
    ):
        self._pairs, self._columns = pairs, columns
        self._length, self._batch_size, self._own, self._pad_id = length, batch_size, rows, pad_id
        self._seed, self._num_epochs = seed, num_epochs
        self._slots = length // min(pair.places for pair in pairs)
        self.set_state({"epoch": 0, "taken": 0})

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._taken * self._batch_size >= len(self._rows):
            self.set_state({"epoch": self._epoch + 1, "taken": 0})
        if self._num_epochs is not None and self._epoch >= self._num_epochs:
            raise StopIteration
        start = self._taken * self._batch_size
        chosen = self._rows[start : start + self._batch_size]
        self._taken += 1
        mine = [chosen[row] for row in self._own if row < len(chosen)]
        batch = fill_pairs(
            [[self._pairs[i] for i in row] for row in mine], len(self._own), self._length, self._slots, self._pad_id
        )
        for name, numbers in self._columns.items():
            batch[name] = np.zeros((len(self._own), self._slots, numbers.shape[1]), numbers.dtype)
            for index, row in enumerate(mine):
                batch[name][index, : len(row)] = numbers[row]
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the batch returned last: small, JSON-serialisable and the same on all processes."""
        return {"epoch": self._epoch, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned for the same pairs and settings."""
        self._epoch, self._taken = state["epoch"], state["taken"]  # epoch, and how many of its batches were returned
        rng = np.random.default_rng((self._seed % 2**32, self._epoch))
        pieces = [_Piece(int(i), self._pairs[i].places) for i in rng.permutation(len(self._pairs))]
        packed = best_fit(pieces, self._length)
        self._rows = [[piece.index for piece in packed[row]] for row in rng.permutation(len(packed))]

    def close(self) -> None:
        """Does nothing, because nothing runs in the background."""


def fill_pairs(
    rows: Sequence[Sequence[EncodedPair]], batch_size: int, length: int, slots: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The batch of up to `batch_size` rows, without `columns` (see `PairBatches`)."""
    shape = (batch_size, 2, length)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
        "ends": np.zeros((batch_size, 2, slots), np.int32),
        "pair_weights": np.zeros((batch_size, slots), np.float32),
    }
    for index, row in enumerate(rows):
        batch["pair_weights"][index, : len(row)] = 1.0
        for side in range(2):
            start = 0
            for slot, pair in enumerate(row):
                item = (pair.chosen, pair.rejected)[side]
                stop = start + len(item)
                batch["tokens"][index, side, start:stop] = item.ids
                batch["targets"][index, side, start : stop - 1] = item.ids[1:]
                batch["positions"][index, side, start:stop] = np.arange(len(item))
                batch["segment_ids"][index, side, start:stop] = slot + 1
                batch["loss_weights"][index, side, start : stop - 1] = item.counted[1:]
                batch["ends"][index, side, slot] = stop - 1
                start = stop
    return batch


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A pair for `best_fit`, which expects a piece of n places to have the length n + 1."""

    index: int
    places: int

    def __len__(self) -> int:
        return self.places + 1


def _joined(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    ids = np.array([*prompt, *answer], np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))
