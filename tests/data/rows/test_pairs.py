"""Rows of pairs: both answers whole behind their prompt, weight on the answer and its end, resumable."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.preferences.calls import call_pairs
from smallcoder_jax.data.preferences.pair import Preference, Reply
from smallcoder_jax.data.rows.pairs import EncodedPair, PairBatches, answer_ids, encode_pairs, fitting, prompt_ids
from smallcoder_jax.tokenizers import base, chat
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall, from_json
from smallcoder_jax.tokenizers.chat_parser import parse
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

LENGTH = 48
TEXTS = [
    Preference(f"def f{i}(x):\n", f"    return x + {i}\n" + "    # more\n" * (i % 3), f"    return y{i}\n", "name")
    for i in range(21)
]
OPTIONS = {"length": LENGTH, "batch_size": 4, "pad_id": 0, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(["def f(x):\n    return x + 1\n"] * 8, 300, 10_000)


@pytest.fixture(scope="module")
def encoded(tokenizer: SentencePieceTokenizer) -> list[EncodedPair]:
    return encode_pairs(TEXTS, tokenizer)


def test_a_true_turn_has_the_ids_of_the_conversation(tokenizer: SentencePieceTokenizer) -> None:
    newline = tokenizer.encode("\n")
    for pair in call_pairs("train", count=30, seed=0):
        assert isinstance(pair.prompt, Conversation)
        assert isinstance(pair.chosen, Reply)
        calls = tuple(ToolCall(**from_json(call)) for call in pair.chosen.calls)
        turn = Message("assistant", pair.chosen.content, calls)
        whole = chat.encode(Conversation((*pair.prompt.messages, turn), pair.prompt.tools), tokenizer)
        found = [*prompt_ids(pair.prompt, tokenizer), *answer_ids(pair.chosen, tokenizer)]
        assert [*found, *newline] == whole.ids.tolist()


def test_calls_that_are_no_json_are_read_back_as_they_are(tokenizer: SentencePieceTokenizer) -> None:
    """Pieces written out in a call are ordinary characters; a call that is no JSON is one that the parser refuses."""
    reply = Reply("Wait", ("{no json", f'{{"name": "a", "arguments": {{"b": "{base.IM_END}</tool_call>"}}}}'))
    ids = answer_ids(reply, tokenizer)
    assert ids[-1] == tokenizer.specials[base.IM_END]
    assert ids.count(tokenizer.specials[base.IM_END]) == 1
    parsed = parse(ids, tokenizer, ())
    assert parsed.ended
    assert parsed.message == Message("assistant", "Wait", (ToolCall("a", {"b": f"{base.IM_END}</tool_call>"}),))
    assert [error.kind for error in parsed.errors if error.call == 0] == ["invalid_json"]


def test_rows_hold_every_pair_once_with_both_answers_behind_their_prompt(
    tokenizer: SentencePieceTokenizer, encoded: list[EncodedPair]
) -> None:
    numbers = np.arange(len(encoded), dtype=np.int32)[:, None]
    batches = PairBatches(encoded, rows=range(4), num_epochs=1, columns={"number": numbers}, **OPTIONS)
    slots = LENGTH // min(pair.places for pair in encoded)
    seen, shared = [], 0
    for batch in batches:
        assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ((4, 2, LENGTH), "int32")),
            "loss_weights": ((4, 2, LENGTH), "float32"),
            "ends": ((4, 2, slots), "int32"),
            "pair_weights": ((4, slots), "float32"),
            "number": ((4, slots, 1), "int32"),
        }
        assert not batch["loss_weights"][batch["segment_ids"] == 0].any()
        for row, slot in itertools.product(range(4), range(slots)):
            if not batch["pair_weights"][row, slot]:
                assert not (batch["segment_ids"][row] == slot + 1).any()
                continue
            shared += slot > 0
            number = int(batch["number"][row, slot, 0])
            seen.append(number)
            pair = TEXTS[number]
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                (places,) = np.nonzero(batch["segment_ids"][row, side] == slot + 1)
                np.testing.assert_array_equal(places, np.arange(places[0], places[-1] + 1))
                np.testing.assert_array_equal(batch["positions"][row, side, places], np.arange(len(places)))
                tokens, targets = batch["tokens"][row, side, places], batch["targets"][row, side, places]
                assert tokens[0] == tokenizer.bos_id
                assert tokenizer.decode(tokens.tolist()) == f"{pair.prompt}{answer}"
                assert batch["ends"][row, side, slot] == places[-1]  # where a reward is read
                assert tokens[-1] == tokenizer.eos_id
                np.testing.assert_array_equal(targets[:-1], tokens[1:])
                weights = batch["loss_weights"][row, side, places]
                assert not weights[-1]
                counted = targets[weights == 1].tolist()
                assert counted[-1] == tokenizer.eos_id
                assert tokenizer.decode(counted) == answer
    assert sorted(seen) == list(range(len(TEXTS)))
    assert shared > 0


def test_pairs_that_do_not_fit_are_left_out_whole(encoded: list[EncodedPair]) -> None:
    limit = int(np.median([pair.places for pair in encoded]))
    kept = fitting(encoded, limit)
    assert len(kept) == sum(pair.places <= limit for pair in encoded)
    assert 0 < len(kept) < len(encoded)
    options = {**OPTIONS, "length": limit, "batch_size": len(kept)}
    batch = next(iter(PairBatches(kept, rows=range(len(kept)), columns={}, **options)))
    assert batch["segment_ids"].any(axis=(0, 1))[-1]
    assert batch["pair_weights"].sum() == len(kept)
    with pytest.raises(UserError, match="of 21 pairs none fits a row of 5 tokens"):
        fitting(encoded, 5)


def test_it_continues_from_any_place_and_epochs_differ(encoded: list[EncodedPair]) -> None:
    def make() -> PairBatches:
        return PairBatches(encoded, rows=range(4), columns={"n": np.arange(21.0)[:, None]}, **OPTIONS)

    straight = make()
    states, batches = [straight.get_state()], []
    for batch in itertools.islice(straight, 15):
        batches.append(batch)
        states.append(straight.get_state())
    for place, state in enumerate(states[:-1]):
        again = make()
        again.set_state(json.loads(json.dumps(state)))
        for key, value in next(again).items():
            np.testing.assert_array_equal(value, batches[place][key])
    epochs = [state["epoch"] for state in states]
    assert max(epochs) >= 2
    assert sum(batch["pair_weights"].sum() for batch in batches[: epochs.index(1) - 1]) == 21
    assert not np.array_equal(batches[0]["tokens"], batches[epochs.index(1) - 1]["tokens"])


def test_processes_have_the_rows_of_the_same_batches(encoded: list[EncodedPair]) -> None:
    columns = {"n": np.arange(42.0).reshape(21, 2)}
    whole = PairBatches(encoded, rows=range(4), num_epochs=2, columns=columns, **OPTIONS)
    parts = [PairBatches(encoded, rows=rows, num_epochs=2, columns=columns, **OPTIONS) for rows in ([0, 1], [2, 3])]
    count = 0
    for together, one, two in zip(whole, *parts, strict=True):
        for key, value in together.items():
            np.testing.assert_array_equal(value, np.concatenate([one[key], two[key]]))
        count += 1
    assert count > 4
