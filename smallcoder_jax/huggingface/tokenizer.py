"""Writes the tokenizer of an exported folder in the format of `transformers`: `tokenizer.json` and its settings.

`transformers` can convert `tokenizer.model`, but then treats a literal U+2581 in a text as a space. Here the entries
are written with real spaces and texts are not rewritten, so that the ids are the same as ours for every text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import write_json
from smallcoder_jax.tokenizers import base, chat
from smallcoder_jax.tokenizers.load import KINDS, read_kind
from smallcoder_jax.tokenizers.sentencepiece import MODEL_FILE, SPACE

TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def write_tokenizer(folder: Path, tokenizer: base.Tokenizer, *, context: int) -> None:
    """Writes the files of `tokenizer` into `folder`, in our own format and in that of `transformers`.

    A published tokenizer (`is_published`) is written as it was published. `context` becomes `model_max_length`. Raises
    UserError when the tokenizer cannot be expressed.
    """
    tokenizer.save(folder)
    kind = read_kind(folder)
    if kind == "hf":
        if not (folder / TOKENIZER_JSON).is_file():
            raise UserError(
                f"the published tokenizer has no {TOKENIZER_JSON}, which is what its ids are checked against; save it "
                "once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) and use that folder"
            )
        return
    if kind == "sentencepiece":
        content = _from_sentencepiece(folder / MODEL_FILE)
    elif kind in ("bytes", "bytes_tools"):
        content = _from_bytes(tokenizer)
    else:
        raise UserError(f"a tokenizer of kind {kind!r} cannot be exported; expected one of {', '.join(KINDS)}")
    special = {i: piece for piece, i in tokenizer.specials.items()}
    content |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "added_tokens": [_added_token(i, special[i]) for i in sorted(special)],
        "post_processor": _begin_with(special[tokenizer.bos_id], tokenizer.bos_id),
    }
    write_json(folder / TOKENIZER_JSON, content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds a third that generate() refuses
        "bos_token": special[tokenizer.bos_id],
        "eos_token": special[tokenizer.eos_id],
        "pad_token": special[tokenizer.pad_id],
    }
    if base.UNK in tokenizer.specials:
        settings["unk_token"] = base.UNK
    write_json(folder / TOKENIZER_CONFIG, settings)
    if chat.has_chat(tokenizer):
        (folder / CHAT_TEMPLATE).write_text(chat.template(), encoding="utf-8", newline="\n")


def is_published(folder: Path) -> bool:
    """Whether the tokenizer that `write_tokenizer` wrote is a published one, whose pieces have their own names."""
    return read_kind(folder) == "hf"


def _from_sentencepiece(path: Path) -> dict[str, Any]:
    """Converts a sentencepiece BPE model to a list of merges.

    Sentencepiece joins the neighbours whose joined piece has the best score, leftmost first. An equivalent list of
    merges has every way to cut every piece in two, best score first.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    ordinary: dict[str, float] = {}
    for i, piece in enumerate(pieces):
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i)):
            pieces[i] = piece.replace(SPACE, " ")
            ordinary[pieces[i]] = processor.get_score(i)
    if len(set(pieces)) != size:
        raise UserError(f"{path.name} holds an entry twice, which {TOKENIZER_JSON} cannot; train another tokenizer")
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(ordinary, key=lambda piece: -ordinary[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    model = _bpe({piece: i for i, piece in enumerate(pieces)}, merges)
    model |= {"unk_token": processor.id_to_piece(processor.unk_id()), "byte_fallback": True}
    return {
        "model": model,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }


def _from_bytes(tokenizer: base.Tokenizer) -> dict[str, Any]:
    """BPE without merges over the 256 bytes, written with the characters of byte-level BPE, and the special pieces."""
    characters = dict(enumerate(_byte_characters())) | {i: piece for piece, i in tokenizer.specials.items()}
    vocab = {character: i for i, character in characters.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"model": _bpe(vocab, []), "pre_tokenizer": byte_level, "decoder": byte_level}


def _byte_characters() -> list[str]:
    """A visible character for every byte: itself if it is visible, else the next from U+0100 (GPT-2's encoder.py)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _added_token(i: int, piece: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": piece, "special": True, **plain}


def _begin_with(piece: str, i: int) -> dict[str, Any]:
    """The post-processor that starts every text with BOS, as every document does in training."""
    begin, text = {"SpecialToken": {"id": piece, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, second],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }
