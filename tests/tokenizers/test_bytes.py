from pathlib import Path

import numpy as np
import pytest

from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer
from tests.tokenizers.conftest import HARD_TEXTS


@pytest.mark.parametrize("name", HARD_TEXTS)
def test_ids_are_the_bytes(name: str) -> None:
    tokenizer, text = ByteTokenizer(), HARD_TEXTS[name]
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


def test_a_cut_is_never_inside_a_character() -> None:
    tokenizer = ByteTokenizer()
    ids = np.array(tokenizer.encode("aé日b"))
    assert tokenizer.borders(ids).tolist() == [True, True, False, True, False, False, True]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").hash == ByteTokenizer().hash
