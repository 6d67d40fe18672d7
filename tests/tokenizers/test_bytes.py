from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.config import TokenizerConfig
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer
from tests.tokenizers.conftest import HARD_TEXTS


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", HARD_TEXTS)
def test_ids_are_the_bytes(name: str, tools: bool) -> None:
    tokenizer, text = ByteTokenizer(tools=tools), HARD_TEXTS[name]
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert not set(ids) & set(tokenizer.specials.values())
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text


def test_specials_are_values_that_no_text_has() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, 254, 255)
    assert tokenizer.pad_id not in (tokenizer.bos_id, tokenizer.eos_id)
    assert min(tokenizer.specials.values()) > 0xF4  # the last first byte of a UTF-8 character
    assert base.FIM_PREFIX in tokenizer.specials


def test_pieces_around_calls_are_beyond_the_bytes() -> None:
    plain, tools = ByteTokenizer(), ByteTokenizer(tools=True)
    assert (TokenizerConfig("bytes").entries, TokenizerConfig("bytes_tools").entries) == (256, 260)
    assert (plain.vocab_size, tools.vocab_size, len(tools.token_bytes)) == (256, 260, 260)
    assert tools.specials == {**plain.specials, **{piece: 256 + i for i, piece in enumerate(base.TOOL_PIECES)}}
    assert tools.token_bytes[:256] == plain.token_bytes
    assert tools.decode([256, *b"{}", 257]) == "{}"
    assert tools.borders(np.array([*b"a", 256, *b"b"])).tolist() == [True, True, True]


def test_the_hash_of_the_plain_one_stays() -> None:
    """Data and runs refer to it."""
    assert ByteTokenizer().hash == "78fa047ca32e25edc328abf7451f4502a0c0c8f5e4f93085f270c2fc953cf34b"
    assert ByteTokenizer(tools=True).hash != ByteTokenizer().hash


def test_a_cut_is_never_inside_a_character() -> None:
    tokenizer = ByteTokenizer()
    ids = np.array(tokenizer.encode("aé日b"))
    assert tokenizer.borders(ids).tolist() == [True, True, False, True, False, False, True]


@pytest.mark.parametrize("tools", [False, True])
def test_saved_and_loaded_is_the_same(tools: bool, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(tools=tools)
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert (loaded.hash, loaded.specials) == (tokenizer.hash, tokenizer.specials)
