"""Byte-pair encoding by sentencepiece: training, and the trained tokenizer.

With these settings `transformers` gives the same ids from the same `tokenizer.model`: identity normalisation, no dummy
prefix, no whitespace removal, byte fallback.

For training, a text is split after every run of newlines, and each part counts as one sentence. An entry may therefore
hold indentation with the word after it, several words, or a line's last characters with its newline, but it never
extends into the next line. Hence a prompt that ends with a newline has the same ids as in the middle of a file, and a
text may be cut after any line without changing an id.
"""

from __future__ import annotations

import collections
import hashlib
import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_bytes
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.vocabulary import Vocabulary

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # how sentencepiece writes a space inside an entry
# The trainer drops a newline at the end of a sentence and rejects entries with a tab. For training, private characters
# replace both; the trained entries have them replaced back.
_NEWLINE, _TAB = "\ue00a", "\ue009"
_RESERVED = re.compile(f"[{_NEWLINE}{_TAB}{SPACE}\0]+")
_ModelProto = vars(sentencepiece_model_pb2)["ModelProto"]  # protobuf makes its classes when the module is imported
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LINE_CHARACTERS = 4000  # longer lines are split; the trainer's limit is in bytes, at most four per character
_TRAINER_SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "split_by_whitespace": False,
    "split_by_unicode_script": False,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": 32,
    "character_coverage": 0.9999,
    "max_sentence_length": 4 * _LINE_CHARACTERS,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "pad_piece": base.PAD,
    "bos_piece": base.BOS,
    "eos_piece": base.EOS,
    "unk_piece": base.UNK,
    "control_symbols": list(base.SPECIAL_PIECES),
    "num_threads": 2,
    "minloglevel": 2,
}


class SentencePieceTokenizer:
    """Implements `base.Tokenizer` over a sentencepiece model. Raises UserError for an unsuitable model."""

    def __init__(self, model: bytes):
        self._model = model
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{MODEL_FILE} is not a sentencepiece model: {error}. Copy or train it again") from error
        self._processor = processor
        self.vocab_size = processor.get_piece_size()
        self.pad_id, self.bos_id, self.eos_id = processor.pad_id(), processor.bos_id(), processor.eos_id()
        if min(self.pad_id, self.bos_id, self.eos_id) < 0:
            raise UserError(
                f"{MODEL_FILE} has no {base.PAD}, {base.BOS} or {base.EOS}; train one with tools.train_tokenizer, or "
                "use a published folder as it is with tokenizer.kind=hf"
            )
        self.specials = {
            piece: i for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)
        }
        self._vocabulary = Vocabulary([_piece_bytes(processor, i) for i in range(self.vocab_size)])
        self.token_bytes = self._vocabulary.token_bytes
        self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if b"".join(self.token_bytes[i] for i in self.encode(base.PROBE)) != base.PROBE.encode():
            raise UserError(
                f"{MODEL_FILE} changes the text that it encodes; expected one with byte fallback and without "
                "normalisation, as tools.train_tokenizer makes it"
            )
        self.hash = hashlib.sha256(b"sentencepiece|" + model).hexdigest()

    def encode(self, text: str) -> list[int]:
        if SPACE not in text:
            return self._processor.encode(text)
        # Sentencepiece reads this character as a space; encoded as its three bytes, it is decoded unchanged.
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += self._space_ids * (i > 0) + self._processor.encode(part)
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        plain = [text if SPACE not in text else "" for text in texts]
        encoded = self._processor.encode(plain, num_threads=threads)
        return [self.encode(text) if SPACE in text else ids for text, ids in zip(texts, encoded, strict=True)]

    def borders(self, ids: np.ndarray) -> np.ndarray:
        return self._vocabulary.borders(ids)

    def decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)
        base.write_kind(folder, "sentencepiece")


def read_sentencepiece(folder: Path) -> SentencePieceTokenizer:
    """The tokenizer in `folder/tokenizer.model`. Raises UserError where it cannot be read."""
    what = f"a trained tokenizer: name a folder that holds {MODEL_FILE}, or leave tokenizer.path empty to train one"
    return SentencePieceTokenizer(read_bytes(folder / MODEL_FILE, what))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, max_bytes: int) -> SentencePieceTokenizer:
    """Trains on the first `max_bytes` UTF-8 bytes of `texts`. The same input gives the same model, byte for byte.

    Raises UserError, with a size that works, when the vocabulary is too small or too large for the texts.
    """
    counts = collections.Counter(_sentences(texts, max_bytes))
    if not counts:
        raise UserError("there is no text to train a tokenizer on; check data.sources and the accounting of the data")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentences.tsv"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{sentence}\t{count}\n" for sentence, count in sorted(counts.items()))
        try:
            model = _train(path, vocab_size)
        except RuntimeError as error:
            raise UserError(
                f"a tokenizer with model.vocab_size={vocab_size} cannot be trained on this text ({counts.total()} "
                f"lines): {_working_size(path, vocab_size, error)}. Or give more text in data.sources, or train on "
                "bytes, which needs no text: --config.tokenizer.kind=bytes --config.model.vocab_size=256"
            ) from error
    return SentencePieceTokenizer(_restore(model))


def _train(path: Path, vocab_size: int, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(path),
        input_format="tsv",
        model_writer=buffer,
        vocab_size=vocab_size,
        **_TRAINER_SETTINGS,
        **settings,
    )
    return buffer.getvalue()


def _working_size(path: Path, vocab_size: int, error: RuntimeError) -> str:
    """Why the trainer rejected the size, and the nearest size that it accepts."""
    too_small = _TOO_SMALL.search(str(error))
    if too_small:
        size, why = int(too_small[1]), "its characters, the 256 bytes and the special pieces alone are"
    else:
        try:  # the number of entries that the text yields
            size = len(_ModelProto.FromString(_train(path, vocab_size, hard_vocab_limit=False)).pieces)
        except RuntimeError:
            return str(error).rpartition("] ")[2].rstrip(". ")
        why = "it fills at most"
    return (
        f"{why} {size:,} entries. Set --config.model.vocab_size={size} (--vocab-size={size} of tools.train_tokenizer)"
    )


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        left -= len(text.encode("utf-8"))
        yield from _lines(text)
        if left <= 0:
            return


def _lines(text: str) -> Iterator[str]:
    clean = _RESERVED.sub("", text).replace("\n", _NEWLINE).replace("\t", _TAB)
    for line in re.split(f"(?<={_NEWLINE})(?!{_NEWLINE})", clean):
        for start in range(0, len(line), _LINE_CHARACTERS):
            yield line[start : start + _LINE_CHARACTERS]


def _restore(model: bytes) -> bytes:
    """The trained model with newlines and tabs in place of the private characters, and without the path of its
    input."""
    proto = _ModelProto.FromString(model)
    for entry in proto.pieces:
        entry.piece = entry.piece.replace(_NEWLINE, "\n").replace(_TAB, "\t")
    del proto.trainer_spec.input[:]
    return proto.SerializeToString(deterministic=True)


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
        return b""
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")
