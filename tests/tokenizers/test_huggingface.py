import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.huggingface import HuggingFaceTokenizer, read_hugging_face
from smallcoder_jax.tokenizers.load import check_tokenizer, load_tokenizer, open_tokenizer
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.tokenizers.conftest import HARD_TEXTS

END = "<|endoftext|>"


def _publish(folder: Path, tokenizer: Tokenizer, **settings: str) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    return folder


@pytest.fixture(scope="module")
def byte_level(code: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GPT-2's: byte-level BPE with one special piece for everything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(code[:8], trainer)
    folder = tmp_path_factory.mktemp("gpt2") / "t"
    return _publish(folder, tokenizer, bos_token=END, eos_token=END, unk_token=END)


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Code Llama's: byte fallback, a space added before every text, its own names for the FIM pieces."""
    specials = ["<unk>", "<s>", "</s>", "▁<PRE>", "▁<SUF>", "▁<MID>"]
    pieces = [*specials, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghij", "▁a", "bc"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("b", "c")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(specials)
    folder = tmp_path_factory.mktemp("llama") / "t"
    return _publish(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte_level", "code_llama"])
def test_text_comes_back_byte_for_byte(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = open_tokenizer("hf", str(request.getfixturevalue(kind)))
    for text in [*HARD_TEXTS.values(), f"a {END} </s> ▁<PRE> b", " a", "a"]:
        if kind == "code_llama" and "\u2581" in text:
            continue  # such a vocabulary cannot tell this character from a space
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
        assert not set(ids) & set(tokenizer.specials.values()), text[:60]


def test_one_special_piece_for_everything(byte_level: Path) -> None:
    tokenizer = read_hugging_face(str(byte_level))
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id
    assert tokenizer.vocab_size == 600
    assert base.FIM_PREFIX not in tokenizer.specials
    assert base.PAD not in tokenizer.specials
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""


def test_published_names_of_special_pieces(code_llama: Path) -> None:
    tokenizer = read_hugging_face(str(code_llama))
    assert [tokenizer.specials[p] for p in (base.FIM_PREFIX, base.FIM_SUFFIX, base.FIM_MIDDLE)] == [3, 4, 5]
    assert tokenizer.encode("abc") == tokenizer.encode_batch(["abc"], 1)[0]
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode("abc a")] == [b"a", b"bc", b" a"]


def test_cutting_at_borders_changes_no_id(byte_level: Path, code: list[str]) -> None:
    tokenizer = read_hugging_face(str(byte_level))
    ids = tokenizer.encode(code[2][:8000])
    borders = np.flatnonzero(tokenizer.borders(np.array(ids)))
    assert len(borders) > len(ids) / 20
    for k in borders[::10]:
        assert tokenizer.encode(tokenizer.decode(ids[k:])) == ids[k:]


def test_saved_and_loaded_is_the_same(byte_level: Path, code_llama: Path, tmp_path: Path) -> None:
    for i, folder in enumerate((byte_level, code_llama)):
        tokenizer = read_hugging_face(str(folder))
        tokenizer.save(tmp_path / str(i))
        loaded = load_tokenizer(tmp_path / str(i))
        assert loaded.hash == tokenizer.hash
        assert loaded.specials == tokenizer.specials


def test_own_tokenizer_as_a_published_one(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    names = {"bos_token": base.BOS, "eos_token": base.EOS, "pad_token": base.PAD, "unk_token": base.UNK}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    published = open_tokenizer("hf", str(tmp_path))
    assert isinstance(published, HuggingFaceTokenizer)
    assert published.specials == trained.specials
    assert published.token_bytes == trained.token_bytes


@pytest.fixture(scope="module")
def qwen(code: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen2.5-Coder's: text is normalised, and pieces of fill-in-the-middle and tools are not flagged special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(code[:2], trainer)
    pieces = (base.FIM_PREFIX, base.FIM_MIDDLE, base.FIM_SUFFIX, base.REPO_NAME, base.FILE_SEP, *base.TOOL_PIECES)
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    return _publish(tmp_path_factory.mktemp("qwen") / "t", tokenizer, eos_token=END)


def test_pieces_that_are_not_flagged_special_never_come_from_a_text(qwen: Path, tmp_path: Path) -> None:
    tokenizer = read_hugging_face(str(qwen))
    assert {base.FIM_PREFIX, base.REPO_NAME, base.FILE_SEP, *base.TOOL_PIECES} <= tokenizer.specials.keys()
    text = f"a {base.FIM_PREFIX}<|fim_suffix|>\n{base.FILE_SEP} <tool_call> </tool_response> {base.REPO_NAME}"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.hash, loaded.specials) == (tokenizer.hash, tokenizer.specials)
    assert loaded.encode(text) == ids


def test_normalisation_is_switched_off(qwen: Path) -> None:
    tokenizer = read_hugging_face(str(qwen))
    for text in ("e\u0301", "\u212b", "\ufb01", "\u3000"):
        assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize(
    "change",
    [normalizers.Lowercase(), normalizers.Strip(), normalizers.Sequence([normalizers.NFKD()])],
    ids=["lower", "strip", "decompose"],
)
def test_a_tokenizer_that_changes_the_text_is_refused(
    byte_level: Path, tmp_path: Path, change: normalizers.Normalizer
) -> None:
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokenizer.normalizer = change
    with pytest.raises(UserError, match="changes the text"):
        read_hugging_face(str(_publish(tmp_path / "t", tokenizer, eos_token=END)))


def test_what_a_text_is_encoded_behind_does_not_join_with_it(tmp_path: Path) -> None:
    """A space is added before every text, so that a text needs something before it, and newlines are joined."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "\n", "a", "\n\n"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "\n")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(pieces[:3])
    read = read_hugging_face(str(_publish(tmp_path / "t", tokenizer, bos_token="<s>", eos_token="</s>")))
    for text in ("\n", "\n\n", "a", "\na", "  a\n\n\n", "\x02"):
        assert b"".join(read.token_bytes[i] for i in read.encode(text)) == text.encode()


def test_a_file_of_an_unknown_model(byte_level: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"Future"'))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_tokenizer("hf", str(tmp_path / "t"))


def test_missing_folder_names_cause_and_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded: .*Three ways out: .*HF_HOME"):
        open_tokenizer("hf", str(tmp_path / "nothing"))


def test_a_tokenizer_that_loses_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, END: 2}, unk_token="[UNK]"))
    folder = _publish(tmp_path / "t", tokenizer, eos_token=END, unk_token="[UNK]")
    with pytest.raises(UserError, match="loses bytes"):
        read_hugging_face(str(folder))


def changed(byte_level: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    shutil.copytree(byte_level, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def last_piece(content: dict[str, Any]) -> str:
    return max(content["model"]["vocab"], key=content["model"]["vocab"].get)


def test_ids_that_are_left_out(byte_level: Path, tmp_path: Path) -> None:
    """The largest id is above the number of entries, as where entries were taken out."""
    whole = read_hugging_face(str(byte_level))

    def leave_out(content: dict[str, Any]) -> None:
        content["model"]["vocab"][last_piece(content)] = 640

    tokenizer = read_hugging_face(changed(byte_level, tmp_path / "t", leave_out))
    assert (whole.vocab_size, tokenizer.vocab_size) == (600, 641)
    assert base.unused_ids(tokenizer, 650) == [*range(599, 640), *range(641, 650)]
    assert tokenizer.token_bytes[640] == whole.token_bytes[599]
    text = "".join(HARD_TEXTS.values()) + whole.token_bytes[599].decode()
    ids = tokenizer.encode(text)
    assert 640 in ids
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.borders(np.array(ids)).shape == (len(ids),)
    check_tokenizer(tokenizer, 641)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").hash == tokenizer.hash


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["model"]["vocab"].update({last_piece(c): 2**32 - 1}), "has 600 entries, but the id 4294967295"),
        (lambda c: c["model"]["vocab"].update({last_piece(c): 5}), "has the id 5 for both"),
        (lambda c: c["model"]["vocab"].update({last_piece(c): -1}), "cannot be loaded"),
        (lambda c: c["model"].update(continuing_subword_prefix="##"), "cannot be loaded"),  # a panic in Rust
        (lambda c: c.pop("model"), "cannot be loaded"),
    ],
)
def test_a_vocabulary_that_is_none(
    byte_level: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        read_hugging_face(changed(byte_level, tmp_path / "t", change))


def test_a_vocabulary_without_a_byte(byte_level: Path, tmp_path: Path) -> None:
    def without_q(content: dict[str, Any]) -> None:
        model = content["model"]
        model["vocab"] = {"qqqq" if piece == "q" else piece: i for piece, i in model["vocab"].items()}
        model["merges"] = [merge for merge in model["merges"] if "q" not in "".join(merge)]

    with pytest.raises(UserError, match="has no entry for 1 of the bytes that occur in texts, such as 0x71"):
        read_hugging_face(changed(byte_level, tmp_path / "t", without_q))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "merges.txt"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_file_is_not_opened(name: str, kind: str, byte_level: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level, tmp_path / "t")
    path = tmp_path / "t" / name
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(it is a {kind}"):
        read_hugging_face(str(tmp_path / "t"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "9" * 5000])
def test_files_that_are_no_json(name: str, text: str, byte_level: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level, tmp_path / "t")
    (tmp_path / "t" / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        read_hugging_face(str(tmp_path / "t"))
