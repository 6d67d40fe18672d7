"""Fill-in-the-middle prompts and what stays of long ones."""

import dataclasses

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.prompts import Room, fill_in_middle
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.tokenizers.base import BOS, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from smallcoder_jax.tokenizers.bytes import ByteTokenizer

OPTIONS = SamplingOptions(max_tokens=10, temperature=0.0)


def parts(prompt):
    """The ids between the special pieces, after checking that these stand in order."""
    s = ByteTokenizer().specials
    ids = list(prompt.ids)
    suffix_at, middle_at = ids.index(s[FIM_SUFFIX]), ids.index(s[FIM_MIDDLE])
    assert ids[:2] == [s[BOS], s[FIM_PREFIX]]
    assert middle_at == len(ids) - 1
    return bytes(ids[2:suffix_at]).decode(), bytes(ids[suffix_at + 1 : middle_at]).decode()


def test_prefix_suffix_middle_order():
    prompt = fill_in_middle(ByteTokenizer(), "def f(", "):\n", Room(100, 10, truncate=False))
    assert parts(prompt) == ("def f(", "):\n")
    assert prompt.dropped == 0


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (50, 50, (13, 13)),  # half each
        (50, 5, (21, 5)),  # what one side leaves goes to the other
        (5, 50, (5, 21)),
        (50, 0, (26, 0)),
        (0, 50, (0, 26)),
        (20, 6, (20, 6)),
    ],
)
def test_what_is_next_to_the_gap_stays(before, after, kept):
    prefix = "".join(chr(ord("!") + i) for i in range(before))
    suffix = "".join(chr(ord("!") + i) for i in range(after))
    prompt = fill_in_middle(ByteTokenizer(), prefix, suffix, Room(40, 10, truncate=True))
    assert parts(prompt) == (prefix[before - kept[0] :], suffix[: kept[1]])
    assert prompt.dropped == before + after - sum(kept)
    assert len(prompt.ids) <= 30


def test_too_long_is_refused_unless_it_may_be_cut():
    with pytest.raises(UserError, match="64 tokens and max_tokens=10"):
        fill_in_middle(ByteTokenizer(), "x" * 50, "y" * 10, Room(40, 10, truncate=False))
    with pytest.raises(UserError, match="context is 14"):
        fill_in_middle(ByteTokenizer(), "x" * 50, "", Room(14, 10, truncate=True))


def test_a_tokenizer_without_the_pieces_cannot_fill_in(tiny):
    tokenizer = ByteTokenizer()
    del tokenizer.specials[FIM_SUFFIX]
    with pytest.raises(UserError, match="fim_suffix"):
        tiny.generator(tokenizer).generate_fim("a", "b", OPTIONS)


def test_the_middle_is_the_continuation_of_that_prompt(tiny):
    s = ByteTokenizer().specials
    ids = [254, s[FIM_PREFIX], *b"ab", s[FIM_SUFFIX], *b"cd", s[FIM_MIDDLE]]
    (expected,) = tiny.generator().generate([ids], OPTIONS)
    (got,) = tiny.generator().generate_fim("ab", "cd", OPTIONS)
    assert got.token_ids == expected.token_ids
    assert got.prompt == "ab"
    prompt = tiny.generator().fim_prompt("ab", "cd", OPTIONS)
    assert "".join(tiny.generator().stream(prompt, OPTIONS)) == got.text


def test_text_that_is_no_unicode_is_refused(tiny):
    with pytest.raises(UserError, match="character 1"):
        tiny.generator().generate(["a\udcff"], dataclasses.replace(OPTIONS, max_tokens=1))
