"""Bytes and characters: prompts, streams of a model of bytes, and how much of what it writes is text."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from smallcoder_jax.generate.chat import ReplyStream
from smallcoder_jax.generate.engine import Completion
from smallcoder_jax.generate.prompts import Room, fill_in_middle, from_ids, from_text
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.utf8 import utf8_measures
from smallcoder_jax.tokenizers.base import EOS, IM_END
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.chat import Conversation, Message

HARD = "naïve 日本語 😀👩‍👧 \0 a\r\nb\r\n é"
ASKED = Conversation((Message("user", "hello"),))


def test_a_random_model_streams_thousands_of_bytes_as_they_are_as_a_whole(make_tiny: Any) -> None:
    generator = make_tiny(context=1024).generator()
    ends = set(generator.tokenizer.specials.values())
    count = characters = 0
    for seed in itertools.count():
        options = SamplingOptions(max_tokens=900, temperature=1.3, seed=seed)
        stream, pieces = generator.stream(HARD, options), []
        try:
            while True:
                pieces.append(next(stream))
        except StopIteration as end:
            completion = end.value
        written = bytes(i for i in completion.token_ids if i not in ends)
        assert "".join(pieces) == completion.text == written.decode("utf-8", errors="replace")
        assert all(piece for piece in pieces)
        count += len(written)
        characters += sum(ord(c) > 127 and c != "\ufffd" for c in completion.text)
        if count > 2000:
            break
    assert characters > 20  # of several bytes, by chance


def test_a_client_never_gets_half_a_character(scripted: Any) -> None:
    generator = scripted(HARD.encode(), [*HARD.encode(), ByteTokenizer().specials[IM_END]])
    options = SamplingOptions(max_tokens=len(HARD.encode()), temperature=0.0)
    pieces = list(generator.stream("x", options))
    assert "".join(pieces) == HARD
    assert sorted(map(len, pieces))[-1] == 1
    reply = ReplyStream(generator, ASKED, dataclasses.replace(options, max_tokens=100))
    assert "".join(reply) == HARD
    assert reply.reply().content == HARD


@pytest.mark.parametrize("text", ["\0", "a\r\nb", "😀", "\ufeff", "é" * 30], ids=repr)
def test_a_prompt_is_its_bytes(text: str) -> None:
    assert from_text(ByteTokenizer(), text, Room(100, 1, truncate=False)).ids == (254, *text.encode())


@pytest.mark.parametrize("room", range(1, 12))
def test_a_prompt_is_not_cut_inside_a_character(room: int) -> None:
    tokenizer = ByteTokenizer()
    prompt = from_text(tokenizer, "ab日😀", Room(20 + room, 20, truncate=True))
    kept = "ab日😀".encode()[-room:] if room < 10 else b"ab\xe6\x97\xa5\xf0\x9f\x98\x80"
    kept = kept.decode(errors="ignore").encode() or kept[-1:]  # but there has to be something to continue
    assert bytes(i for i in prompt.ids if i != 254) == kept
    assert prompt.dropped == 10 - len(prompt.ids)
    assert len(prompt.ids) <= room


def test_neither_side_of_a_gap_is_cut_inside_a_character() -> None:
    tokenizer = ByteTokenizer()
    for room in range(16, 40):
        prompt = fill_in_middle(tokenizer, "é" * 20, "日" * 20, Room(room, 10, truncate=True))
        assert set(tokenizer.decode(list(prompt.ids))) <= set("é日")
        assert prompt.dropped == 100 + 4 - len(prompt.ids)
        assert len(prompt.ids) <= room - 10


def test_ids_that_end_inside_a_character_are_continued(tiny: Any) -> None:
    half = "😀".encode()[:2]
    assert from_ids(ByteTokenizer(), list(half), Room(9, 1, truncate=False)).ids == tuple(half)
    (completion,) = tiny.generator().generate([list(half)], SamplingOptions(max_tokens=4, temperature=0.0))
    assert len(completion.token_ids) >= 1


def written(data: bytes, *, reason: Any = "length", end: tuple[int, ...] = ()) -> Completion:
    return Completion("", "", (*data, *end), (), reason, 0.0, 1, 0)


def test_shares_of_what_is_valid_and_of_what_was_cut_off() -> None:
    tokenizer = ByteTokenizer(tools=True)
    end = (tokenizer.specials[EOS],)
    valid = [written("é\0\r\n😀".encode()), written("é".encode(), reason="stop", end=end), written(b"")]
    cut = [written("aé".encode()[:-1]), written("😀".encode()[:3])]
    invalid = [
        written("aé".encode()[:-1], reason="stop", end=end),  # the model ended it
        written(b"\x80a"),
        written(b"\xc3a"),
        written(b"\xed\xa0\x80"),  # a surrogate
        written(b"\xc3\xc3"),  # cut off behind something invalid
    ]
    found = utf8_measures([*valid, *cut, *invalid], tokenizer)
    assert found == {"utf8_validity": 0.3, "utf8_cut_off": 0.2}
    assert utf8_measures(valid, tokenizer)["utf8_validity"] == 1.0


def test_it_is_measured_for_tokenizers_of_bytes_only() -> None:
    assert utf8_measures([], ByteTokenizer()) == {}
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = [*tokenizer.token_bytes[:-1], b"ab"]
    assert utf8_measures([written(b"a")], tokenizer) == {}
