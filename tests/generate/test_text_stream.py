"""Text that comes in pieces."""

import numpy as np
import pytest

from smallcoder_jax.generate.text import TextStream


def feed(pieces, stop=()):
    stream = TextStream(stop)
    out = [stream.push(piece) for piece in pieces]
    return [*out, stream.finish()], stream.stopped


def test_a_character_comes_with_its_last_byte():
    pieces = [bytes([value]) for value in "é€😀".encode()]
    assert feed(pieces)[0] == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_an_unfinished_character_and_wrong_bytes_become_replacements_as_in_decode():
    for data in [b"a\xe2\x82", b"\xff b", b"\xe2(\xa1"]:
        for cut in range(len(data)):
            assert "".join(feed([data[:cut], data[cut:]])[0]) == data.decode("utf-8", errors="replace")


def test_text_ends_before_the_earliest_stop_string():
    pieces, stopped = feed([b"def f():\n", b"    pass\n\n", b"\nclass A"], stop=("class", "\n\n\n"))
    assert "".join(pieces) == "def f():\n    pass"
    assert stopped


def test_what_may_begin_a_stop_string_waits_until_it_is_decided():
    pieces, stopped = feed([b"a\n", b"\n", b"b"], stop=("\n\ndef",))
    assert pieces == ["a", "", "\n\nb", ""]
    assert not stopped
    assert feed([b"x\n\nde"], stop=("\n\ndef",))[0] == ["x", "\n\nde"]


def test_nothing_comes_after_a_stop():
    pieces, _ = feed([b"a;b", b"c"], stop=(";",))
    assert pieces == ["a", "", ""]


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_into_tokens_gives_the_text_up_to_the_first_stop(seed):
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("ab\n é😀"), size=40))
    stop = ("ab", "\n\n", "é😀a")
    data = text.encode()
    cuts = sorted(random.choice(len(data), size=15, replace=False))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    ends = [text.find(s) for s in stop if s in text]
    assert "".join(feed(pieces, stop)[0]) == text[: min(ends, default=len(text))]
