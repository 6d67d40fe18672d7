"""The exported tokenizer.json gives our ids, whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.huggingface import tokenizer as export_tokenizer
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.huggingface import HuggingFaceTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer


def loaded(folder: Path, tokenizer: base.Tokenizer) -> PreTrainedTokenizerFast:
    export_tokenizer.write_tokenizer(folder, tokenizer, context=128)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_ids_of_random_mixtures(tokenizer: base.Tokenizer, tmp_path: Path) -> None:
    theirs = loaded(tmp_path, tokenizer)
    rng = np.random.default_rng(1)
    pieces = [piece.decode("utf-8", "replace") for piece in tokenizer.token_bytes if piece]
    parts = [*pieces, *tokenizer.specials, "\u2581", " ", "\n", "\t", "\r\n", "=", "é", "中", "😀"]
    texts = ["".join(rng.choice(parts, rng.integers(1, 40))) for _ in range(2000)]
    texts += ["".join(rng.choice([" ", "="]) * int(rng.integers(1, 50)) for _ in range(6)) for _ in range(500)]
    wrong = [text for text in texts if theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
             != tokenizer.encode(text)]  # fmt: skip
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("text", ["", "\u2581", "a </s> b", "<|im_end|>", "\x00", "tab\tcrlf\r\n", "😀" * 50])
def test_text_comes_back(text: str, tokenizer: base.Tokenizer, tmp_path: Path) -> None:
    for kind in (tokenizer, ByteTokenizer(), ByteTokenizer(tools=True)):
        theirs = loaded(tmp_path, kind)
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == [kind.bos_id, *kind.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes_tools"])
def test_specials_are_parsed_unless_split(kind: str, tokenizer: base.Tokenizer, tmp_path: Path) -> None:
    tokenizer = tokenizer if kind == "sentencepiece" else ByteTokenizer(tools=True)
    theirs = loaded(tmp_path, tokenizer)
    for piece, i in tokenizer.specials.items():
        assert theirs.encode(f"a{piece}b", add_special_tokens=False) == [
            *tokenizer.encode("a"), i, *tokenizer.encode("b")
        ]  # fmt: skip
    assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert theirs.padding_side == "left"
    assert set(theirs(["a", "bc"], padding=True)) == {"input_ids", "attention_mask"}
    assert theirs.model_max_length == 128


def test_our_own_files_are_there_too(tokenizer: base.Tokenizer, tmp_path: Path) -> None:
    loaded(tmp_path, tokenizer)
    assert load_tokenizer(tmp_path).hash == tokenizer.hash


def test_tools_in_the_chat_template(tokenizer: base.Tokenizer, tmp_path: Path) -> None:
    theirs = loaded(tmp_path, tokenizer)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "two"},
    ]
    text = theirs.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s><|im_start|>system\nBe brief.\n\n")
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    ) in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("Be brief.") == 1
    ids = theirs.apply_chat_template(messages, tools=[tool])["input_ids"]
    for piece in ("<tool_call>", "</tool_call>"):
        assert tokenizer.specials[piece] in ids
    with pytest.raises(Exception, match="expected system, user, assistant or tool"):
        theirs.apply_chat_template([{"role": "judge", "content": ""}], tokenize=False)


def published() -> HuggingFaceTokenizer:
    """Byte-level BPE in the manner of GPT-2, with one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end), "gpt")


def test_a_published_tokenizer_is_written_as_it_was(tmp_path: Path) -> None:
    published().save(tmp_path / "downloaded")
    tokenizer = load_tokenizer(tmp_path / "downloaded")
    theirs = loaded(tmp_path / "one", tokenizer)
    assert export_tokenizer.is_published(tmp_path / "one")
    assert not (tmp_path / "one" / export_tokenizer.CHAT_TEMPLATE).exists()
    assert theirs.encode("abba é") == tokenizer.encode("abba é")
    again = load_tokenizer(tmp_path / "one")
    export_tokenizer.write_tokenizer(tmp_path / "two", again, context=128)
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    class Odd(ByteTokenizer):
        def save(self, folder: Path) -> None:
            base.write_kind(folder, "odd")

    with pytest.raises(UserError, match="kind 'odd' cannot be exported"):
        export_tokenizer.write_tokenizer(tmp_path, Odd(), context=1)
