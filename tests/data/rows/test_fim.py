import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.rows.fim import MIN_CHARACTERS, FillInTheMiddle
from smallcoder_jax.tokenizers.base import FILE_SEP, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece

CODE = '''
def fibonacci(n):
\tif n < 2:  # naïve \u2013 Grüße, 日本語 and 🙂🙃 in a comment
\t\treturn n
    return fibonacci(n - 1) + fibonacci(n - 2)\r\n\r\n

class   Stack(list):\n        """Last in, first out.   """
        def push(self, item):  return    self.append(item)   \n\n\n
x = [0x1F, 12345, 1_000_000, 3.14159]; s = "</s> <|fim_prefix|> \u2581\u2581 \\u0000"
e\u0301\u0302 combining, \U0001f468\u200d\U0001f469\u200d\U0001f467 joined, trailing spaces\x20\x20\x20
'''


@pytest.fixture(scope="module")
def sentencepiece():
    texts = [
        CODE * 3,
        "import os\nimport sys\n\n\nprint(os.path.join(sys.path[0], 'file'))\n" * 20,
        "for i in range(10):\n" * 9,
    ]
    return train_sentencepiece(texts, vocab_size=480, max_bytes=1 << 20)


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("sentencepiece")


def text_of(tokenizer, ids):
    return b"".join(tokenizer.token_bytes[id] for id in ids).decode("utf-8")


def document(tokenizer, text):
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.uint16)


def rearranger(tokenizer, rate=1.0, spm_share=0.5):
    return FillInTheMiddle(tokenizer, rate=rate, spm_share=spm_share)


def parts(tokenizer, ids):
    """(order, prefix, middle, suffix) of a rearranged document; prefix and middle are one part in SPM."""
    ids = ids.tolist()
    pre, suf, mid = (tokenizer.specials[piece] for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))
    assert ids[:2] == [tokenizer.bos_id, pre]
    assert ids[-1] == tokenizer.eos_id
    assert [sum(id == special for id in ids) for special in (pre, suf, mid)] == [1, 1, 1]
    before, after, last = (
        ids[2 : ids.index(suf)],
        ids[ids.index(suf) + 1 : ids.index(mid)],
        ids[ids.index(mid) + 1 : -1],
    )
    return before, after, last


def test_every_pair_of_cuts_gives_the_ids_of_each_part_alone(tokenizer):
    text = CODE[:160] + CODE[-120:]
    body = np.array(tokenizer.encode(text), np.uint16)
    fim = rearranger(tokenizer)
    for first in range(0, len(text) + 1, 3):
        for second in range(first, len(text) + 1, 5):
            cut = text[:first], text[first:second], text[second:]
            split = fim.split(body, first, second)
            assert [ids.tolist() for ids in split] == [tokenizer.encode(part) for part in cut]


def test_both_orders_have_their_format_and_all_of_the_text(tokenizer):
    ids = document(tokenizer, CODE)
    for seed in range(50):
        prefix, suffix, middle = parts(
            tokenizer, rearranger(tokenizer, spm_share=0.0)(ids, np.random.default_rng(seed))
        )
        assert text_of(tokenizer, prefix + middle + suffix) == CODE
        for part in (prefix, middle, suffix):
            assert part == tokenizer.encode(text_of(tokenizer, part))
        nothing, suffix, rest = parts(tokenizer, rearranger(tokenizer, spm_share=1.0)(ids, np.random.default_rng(seed)))
        assert nothing == []
        assert rest == prefix + middle  # the same draws, the other order
        assert text_of(tokenizer, rest + suffix) == CODE


def test_shares_of_rearranged_documents_and_of_spm(sentencepiece):
    ids = document(sentencepiece, CODE)
    fim = rearranger(sentencepiece, rate=0.5, spm_share=0.25)
    results = [fim(ids, np.random.default_rng(seed)) for seed in range(2000)]
    changed = [result for result in results if len(result) != len(ids) or not np.array_equal(result, ids)]
    suffix_id = sentencepiece.specials[FIM_SUFFIX]
    spm = [result for result in changed if result[2] == suffix_id]
    assert len(changed) / len(results) == pytest.approx(0.5, abs=0.05)
    assert len(spm) / len(changed) == pytest.approx(0.25, abs=0.05)  # a PSM document with no prefix is rare


def test_cuts_are_uniform_over_characters(sentencepiece):
    # Characters of one to four bytes: cuts drawn over bytes or tokens would crowd into one half.
    text = "a" * 200 + "🙂" * 200
    ids = document(sentencepiece, text)
    fim = rearranger(sentencepiece, spm_share=0.0)
    lengths = []
    for seed in range(1500):
        prefix, _, middle = parts(sentencepiece, fim(ids, np.random.default_rng(seed)))
        lengths += [len(text_of(sentencepiece, prefix)), len(text_of(sentencepiece, prefix + middle))]
    counts = np.histogram(lengths, bins=8, range=(0, 400))[0]
    assert counts / len(lengths) == pytest.approx(np.full(8, 1 / 8), abs=0.03)


def test_the_same_draws_give_the_same_document(sentencepiece):
    ids = document(sentencepiece, CODE)
    fim = rearranger(sentencepiece)
    first, again, other = (fim(ids, np.random.default_rng(seed)) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == ids.dtype


def test_short_documents_pass_through(tokenizer):
    fim = rearranger(tokenizer)
    for text in ("", "x", "🙂" * (MIN_CHARACTERS - 1)):
        ids = document(tokenizer, text)
        assert np.array_equal(fim(ids, np.random.default_rng(0)), ids)
    changed = fim(document(tokenizer, "x" * MIN_CHARACTERS), np.random.default_rng(0))
    assert tokenizer.specials[FIM_PREFIX] in changed


def test_specials_inside_a_document_are_kept(tokenizer):
    separator = tokenizer.specials[FILE_SEP]
    first, second = tokenizer.encode("import a\nprint('hello')\n"), tokenizer.encode("  x = 1\n    y = 22\n")
    ids = np.array([tokenizer.bos_id, *first, separator, *second, tokenizer.eos_id], np.uint16)
    for seed in range(200):
        changed = rearranger(tokenizer, spm_share=0.0)(ids, np.random.default_rng(seed))
        prefix, suffix, middle = parts(tokenizer, changed)
        whole = prefix + middle + suffix
        assert whole.count(separator) == 1
        before = whole[: whole.index(separator)]
        assert text_of(tokenizer, before) == text_of(tokenizer, first)
        assert text_of(tokenizer, whole) == text_of(tokenizer, first + second)


def test_a_tokenizer_without_the_pieces_is_refused():
    tokenizer = ByteTokenizer()
    del tokenizer.specials[FIM_MIDDLE]
    with pytest.raises(UserError, match=r"<\|fim_middle\|>.*fim_rate=0"):
        rearranger(tokenizer)
