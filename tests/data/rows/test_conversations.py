"""Rows of conversations: each exactly once, weight on the assistant's words and nothing else, resumable."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.rows.conversations import ConversationBatches
from smallcoder_jax.tokenizers import base, chat
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_parser import parse
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

LENGTH = 512
OPTIONS = {"length": LENGTH, "batch_size": 4, "pad_id": 0, "seed": 3, "packed": True}


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(["def f(x):\n    return x + 1\n"] * 8, 300, 10_000)


def talk(number: int) -> Conversation:
    call = ToolCall("run", {"code": "x = 1\n" * (number % 7)})
    return Conversation(
        (
            Message("user", f"Question {number}" + " please" * (number % 5)),
            Message("assistant", "", (call,) * (1 + number % 2)),
            *[Message("tool", f"{number}\n")] * (1 + number % 2),
            Message("assistant", f"Answer\n{number}."),
        )
    )


TALKS = [talk(number) for number in range(60)]


@pytest.fixture(scope="module")
def encoded(tokenizer: SentencePieceTokenizer) -> list[chat.Encoded]:
    return [chat.encode(one, tokenizer) for one in TALKS]


def test_the_weights_are_on_what_the_assistant_wrote(
    tokenizer: SentencePieceTokenizer, encoded: list[chat.Encoded]
) -> None:
    """The targets with weight 1, decoded and parsed, are the turns of the assistant with their end."""
    batches = ConversationBatches(encoded, rows=range(4), num_epochs=1, **OPTIONS)
    assert batches.dropped == 0
    end = tokenizer.specials[base.IM_END]
    found, shared = [], 0
    for batch in batches:
        assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ((4, LENGTH), "int32")),
            "loss_weights": ((4, LENGTH), "float32"),
        }
        assert not batch["loss_weights"][batch["segment_ids"] == 0].any()
        for row in range(4):
            shared += batch["segment_ids"][row].max() > 1
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = batch["segment_ids"][row] == segment
                tokens, targets = batch["tokens"][row, here], batch["targets"][row, here]
                assert tokens[0] == tokenizer.bos_id
                np.testing.assert_array_equal(tokens[1:], targets[:-1])  # the next token, not the one after it
                np.testing.assert_array_equal(batch["positions"][row, here], np.arange(here.sum()))
                counted = targets[batch["loss_weights"][row, here] == 1].tolist()
                turns = []
                while counted:
                    stop = counted.index(end) + 1
                    turns.append(parse(counted[:stop], tokenizer, ()).message)
                    counted = counted[stop:]
                found.append(tuple(turns))
    assert shared > 0
    wanted = [tuple(message for message in one.messages if message.role == "assistant") for one in TALKS]
    assert sorted(found, key=repr) == sorted(wanted, key=repr)


def test_too_long_ones_are_dropped_and_counted(encoded: list[chat.Encoded]) -> None:
    limit = int(np.median([len(one) for one in encoded]))
    options = {**OPTIONS, "length": limit - 1}  # a conversation of n ids takes n - 1 places
    batches = ConversationBatches(encoded, rows=range(4), num_epochs=1, **options)
    kept = sum(len(one) <= limit for one in encoded)
    assert batches.dropped == len(encoded) - kept > 0
    segments = sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches)
    assert segments == kept
    with pytest.raises(UserError, match="of 60 conversations none fits a row of 8 tokens"):
        ConversationBatches(encoded, rows=range(4), **{**OPTIONS, "length": 8})


def test_it_continues_from_any_place_and_epochs_differ(encoded: list[chat.Encoded]) -> None:
    def make() -> ConversationBatches:
        return ConversationBatches(encoded, rows=range(4), **OPTIONS)

    straight = make()
    states, batches = [straight.get_state()], []
    for batch in itertools.islice(straight, 15):
        batches.append(batch)
        states.append(straight.get_state())
    epochs = [state["epoch"] for state in states]
    assert max(epochs) >= 1
    for place, state in enumerate(states[:-1]):
        again = make()
        again.set_state(json.loads(json.dumps(state)))
        for key, value in next(again).items():
            np.testing.assert_array_equal(value, batches[place][key])
    second = epochs.index(1)
    assert not np.array_equal(batches[0]["tokens"], batches[second - 1]["tokens"])


def test_processes_have_the_rows_of_the_same_batches(encoded: list[chat.Encoded]) -> None:
    whole = ConversationBatches(encoded, rows=range(4), num_epochs=2, **OPTIONS)
    parts = [ConversationBatches(encoded, rows=rows, num_epochs=2, **OPTIONS) for rows in ([0, 1], [2, 3])]
    count = 0
    for together, one, two in zip(whole, *parts, strict=True):
        for key, value in together.items():
            np.testing.assert_array_equal(value, np.concatenate([one[key], two[key]]))
        count += 1
    assert count > 2


def test_unpacked_a_row_is_one_conversation_and_an_epoch_has_all(encoded: list[chat.Encoded]) -> None:
    batches = ConversationBatches(encoded, rows=range(4), num_epochs=1, **{**OPTIONS, "packed": False})
    rows = [row for batch in batches for row in zip(batch["targets"], batch["segment_ids"], strict=True)]
    found = [tuple(targets[segments > 0].tolist()) for targets, segments in rows]
    assert sorted(found) == sorted(tuple(one.ids[1:].tolist()) for one in encoded)
    assert found != [tuple(one.ids[1:].tolist()) for one in encoded]  # shuffled
    assert max(segments.max() for _, segments in rows) == 1
