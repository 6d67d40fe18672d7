import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.load import check_tokenizer, load_tokenizer, spare_rows
from smallcoder_jax.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer, train_sentencepiece
from tests.tokenizers.conftest import HARD_TEXTS


def _bytes(tokenizer: base.Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[i] for i in ids)


def test_every_special_piece_is_one_id(trained: SentencePieceTokenizer) -> None:
    for piece in (base.PAD, base.BOS, base.EOS, base.UNK, *base.SPECIAL_PIECES):
        assert trained.token_bytes[trained.specials[piece]] == b""
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert len(set(trained.specials.values())) == len(base.SPECIAL_PIECES) + 4


@pytest.mark.parametrize("name", [*HARD_TEXTS, "the space of sentencepiece"])
def test_text_comes_back_byte_for_byte_without_special_ids(trained: SentencePieceTokenizer, name: str) -> None:
    text = HARD_TEXTS.get(name, "a \u2581b\u2581\u2581")
    ids = trained.encode(text)
    assert _bytes(trained, ids) == text.encode()
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.specials.values())


def test_batch_is_the_same_as_one_by_one(trained: SentencePieceTokenizer, code: list[str]) -> None:
    texts = [*HARD_TEXTS.values(), "\u2581", *code[:5]]
    assert trained.encode_batch(texts, 2) == [trained.encode(text) for text in texts]


def test_newlines_and_indentation_are_entries(trained: SentencePieceTokenizer) -> None:
    ids = trained.encode("def f(self):\n        return self\n\n\nclass A:\n")
    assert _bytes(trained, ids[-1:]).endswith(b"\n")
    assert max(len(trained.token_bytes[i]) for i in ids) > 8
    # an entry never goes on into the next line
    assert not any(b"\n" in piece.rstrip(b"\n") for piece in trained.token_bytes)


def test_tabs_can_be_learned() -> None:
    texts = [f"func f{i}() {{\n\t\treturn value{i}\n\t}}\n" for i in range(500)]
    tokenizer = train_sentencepiece(texts, vocab_size=340, max_bytes=1_000_000)
    assert any(b"\t\tret" in piece for piece in tokenizer.token_bytes)


def test_training_twice_gives_the_same_model(trained: SentencePieceTokenizer, code: list[str]) -> None:
    assert train_sentencepiece(code, vocab_size=1200, max_bytes=10_000_000).hash == trained.hash
    assert train_sentencepiece(code, vocab_size=1200, max_bytes=100_000).hash != trained.hash


def test_a_cut_changes_no_id_beyond_the_next_border(trained: SentencePieceTokenizer, code: list[str]) -> None:
    text = code[3][:6000] + HARD_TEXTS["emoji"] + HARD_TEXTS["tabs"] + HARD_TEXTS["long whitespace"]
    ids = trained.encode(text)
    borders = np.flatnonzero(trained.borders(np.array(ids)))
    assert len(borders) > len(ids) / 5
    starts = np.cumsum([0, *(len(trained.token_bytes[i]) for i in ids)])
    for cut in range(0, len(text), 7):
        place = len(text[:cut].encode())
        before = int(borders[starts[borders] <= place][-1])
        after = next((int(k) for k in borders if starts[k] >= place), len(ids))
        assert trained.encode(text[:cut])[:before] == ids[:before]
        behind = trained.encode(text[cut:])
        assert behind[len(behind) - (len(ids) - after) :] == ids[after:]


def test_saved_and_loaded_is_the_same(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert loaded.hash == trained.hash
    assert loaded.encode("import os\n") == trained.encode("import os\n")


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_a_size_that_does_not_fit_the_text_names_one_that_does(code: list[str], vocab_size: int) -> None:
    with pytest.raises(
        UserError, match=f"vocab_size={vocab_size} cannot be trained on this text.*data.sources"
    ) as told:
        train_sentencepiece(code[:2], vocab_size=vocab_size, max_bytes=50_000)
    assert not re.search("INTERNAL|trainer|character_coverage|<=", str(told.value))
    assert "--config.tokenizer.kind=bytes --config.model.vocab_size=256" in str(told.value)
    named = re.search(r"--config\.model\.vocab_size=(\d+) \(--vocab-size=\1 of tools.train_tokenizer", str(told.value))
    assert named
    size = int(named[1])
    assert train_sentencepiece(code[:2], vocab_size=size, max_bytes=50_000).vocab_size == size
    beyond = size + 1 if vocab_size > size else size - 1
    with pytest.raises(UserError, match=f"vocab_size={size} "):
        train_sentencepiece(code[:2], vocab_size=beyond, max_bytes=50_000)


def test_nothing_to_train_on() -> None:
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], vocab_size=500, max_bytes=1000)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer_kind\.json does not exist"):
        load_tokenizer(tmp_path)
    base.write_kind(tmp_path, "sentencepiece")
    with pytest.raises(UserError, match=r"tokenizer\.model does not exist; expected a trained tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / base.KIND_FILE).write_text('{"kind": "other"}')
    with pytest.raises(UserError, match=r"'other'.*not known"):
        load_tokenizer(tmp_path)


def test_wrong_size_and_changed_tokenizer(trained: SentencePieceTokenizer) -> None:
    check_tokenizer(trained, 1200, trained.hash)
    with pytest.raises(UserError, match=r"has 1200 entries, but model.vocab_size=99"):
        check_tokenizer(trained, 99)
    with pytest.raises(UserError, match=r"changed since the data was prepared.* or delete here and there; then"):
        check_tokenizer(trained, 1200, "0" * 64, (Path("here"), Path("there")))


def test_a_table_may_have_some_spare_rows(trained: SentencePieceTokenizer) -> None:
    assert spare_rows(trained, 1200) is None
    for rows in (1201, 1280, 1371):
        check_tokenizer(trained, rows)
        said = spare_rows(trained, rows)
        assert said is not None
        assert said.startswith(f"model.vocab_size={rows} and the tokenizer has 1200 entries: {rows - 1200} rows are")
    for rows in (1199, 1372, 2400):
        with pytest.raises(UserError, match=rf"has 1200 entries, but model.vocab_size={rows}"):
            check_tokenizer(trained, rows)
    assert base.unused_ids(trained, 1200) == []
    assert base.unused_ids(trained, 1203) == [1200, 1201, 1202]


def changed(trained: SentencePieceTokenizer, folder: Path, change: Callable[[Any], None]) -> Path:
    trained.save(folder)
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString((folder / MODEL_FILE).read_bytes())
    change(proto)
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString())
    return folder


def without_bytes(proto: Any) -> None:
    kept = [piece for piece in proto.pieces if piece.type != piece.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    proto.trainer_spec.byte_fallback = False


@pytest.mark.parametrize(
    "change",
    [
        without_bytes,
        lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", True),
        lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True),
    ],
)
def test_a_model_that_changes_the_text_is_refused(
    change: Callable[[Any], None], trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model changes the text that it encodes"):
        load_tokenizer(changed(trained, tmp_path, change))


def test_a_damaged_model_is_read_or_refused(trained: SentencePieceTokenizer) -> None:
    rng = np.random.default_rng(0)
    whole, read = trained._model, 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] = int(rng.integers(256))
        with contextlib.suppress(UserError):
            read += SentencePieceTokenizer(bytes(damaged)).vocab_size > 0
    assert 0 < read < 60  # a byte of a score is still a model


def test_a_model_that_is_no_file(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / MODEL_FILE).unlink()
    (tmp_path / MODEL_FILE).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read \(it is a device"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def published(trained: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer as an exported folder holds it."""
    folder = tmp_path_factory.mktemp("published")
    trained.save(folder)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": False,
        **{"bos_token": base.BOS, "eos_token": base.EOS, "pad_token": base.PAD, "unk_token": base.UNK},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_transformers_gives_the_same_ids(trained: SentencePieceTokenizer, published: Path, code: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(published))
    assert len(theirs) == trained.vocab_size
    for text in [*HARD_TEXTS.values(), *code]:
        encoded = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encoded == trained.encode(text), text[:60]
