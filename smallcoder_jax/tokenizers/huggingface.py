"""Published tokenizers, loaded with `transformers`: byte-level BPE (GPT-2, StarCoder, Qwen) and sentencepiece-like BPE
with byte fallback (Llama, Code Llama). No code from the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_bytes, read_json
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.vocabulary import Vocabulary

# This package's special pieces, each with its names in published tokenizers.
_ALIASES = {
    base.FIM_PREFIX: ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "▁<PRE>", "<PRE>"),
    base.FIM_MIDDLE: ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "▁<MID>", "<MID>"),
    base.FIM_SUFFIX: ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "▁<SUF>", "<SUF>"),
    base.FIM_PAD: ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    base.REPO_NAME: ("<|repo_name|>", "<repo_name>", "<reponame>"),
    base.FILE_SEP: ("<|file_sep|>", "<file_sep>", "<file_separator>"),
    base.IM_START: ("<|im_start|>",),
    base.IM_END: ("<|im_end|>",),
    **{piece: (piece,) for piece in base.TOOL_PIECES},
}
# Candidates for the text that is put before every text to encode, see `_find_lead`.
_LEADS = ("\n", "\x02")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_UTF8 = {*range(0xC0), *range(0xC2, 0xF5)}  # the bytes that occur in texts
_MOST_IDS = 2  # ids per entry; a vocabulary with more gaps than entries has a damaged id
# The files that `transformers` may read from a tokenizer's folder.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "config.json", "chat_template.json", "chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


class HuggingFaceTokenizer:
    """Implements `base.Tokenizer` over a loaded `transformers` tokenizer.

    `specials` holds the pieces that the tokenizer has; without FIM pieces it does not support fill-in-the-middle. Where
    it has no padding id, the end-of-text id is used for padding, which is masked everywhere. Unicode normalisation
    (NFC, NFKC) is switched off, because it would change the text.
    """

    def __init__(self, tokenizer: Any, name: str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"tokenizer {name} has no tokenizer.json form; convert it with transformers first")
        self._tokenizer, self._backend, self._name = tokenizer, backend, name
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # special pieces written out in a text are split like any other text
        _mark_specials(tokenizer, backend)
        if type(backend.normalizer).__name__ in ("NFC", "NFKC"):
            backend.normalizer = None
        settings = json.loads(backend.to_str())
        self.vocab_size = _table_size(backend.get_vocab(with_added_tokens=True), name)
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"tokenizer {name} has no end-of-text token; choose one that has")
        self.eos_id = int(eos)
        self.bos_id = int(self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        self.pad_id = int(self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        added = tokenizer.added_tokens_decoder
        self.specials = self._find_specials({str(token): int(i) for i, token in added.items() if token.special})
        self._vocabulary = Vocabulary(self._read_bytes(settings, set(self.specials.values())))
        self.token_bytes = self._vocabulary.token_bytes
        self._lead, self._lead_ids = self._find_lead()
        if b"".join(self.token_bytes[i] for i in self.encode(base.PROBE)) != base.PROBE.encode():
            raise self._changes_text()
        identity = json.dumps([settings, self.bos_id, self.eos_id, self.pad_id], sort_keys=True)
        self.hash = hashlib.sha256(b"hf|" + identity.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        del threads  # the library uses RAYON_NUM_THREADS threads
        encoded = self._backend.encode_batch_fast([self._lead + text for text in texts], add_special_tokens=False)
        return [item.ids[len(self._lead_ids) :] for item in encoded]

    def borders(self, ids: np.ndarray) -> np.ndarray:
        return self._vocabulary.borders(ids)

    def decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(str(folder))
        base.write_kind(folder, "hf")

    def _find_specials(self, named: dict[str, int]) -> dict[str, int]:
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        found = {**named, base.BOS: self.bos_id, base.EOS: self.eos_id}
        if self._tokenizer.pad_token_id is not None:
            found[base.PAD] = self.pad_id
        for piece, names in _ALIASES.items():
            known = next((name for name in names if name in vocabulary), None)
            if known is not None:
                found[piece] = vocabulary[known]
        return found

    def _read_bytes(self, settings: dict[str, Any], specials: set[int]) -> list[bytes]:
        byte_level = '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["decoder"]])
        if not byte_level and not settings["model"].get("byte_fallback"):
            raise UserError(
                f"tokenizer {self._name} ({settings['model'].get('type')}) loses bytes of the text; expected "
                "byte-level BPE or BPE with byte fallback: choose another tokenizer"
            )
        alphabet = _byte_alphabet()
        added = {int(item["id"]) for item in settings["added_tokens"]}
        pieces = [b""] * self.vocab_size
        for piece, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i in specials:
                continue
            if i in added:
                pieces[i] = piece.encode("utf-8")
            elif byte_level and alphabet.keys() >= set(piece):
                pieces[i] = bytes(alphabet[character] for character in piece)
            elif byte_level:
                pieces[i] = piece.encode("utf-8")  # never encoded, since texts are first mapped to the alphabet
            elif match := _BYTE_PIECE.fullmatch(piece):
                pieces[i] = bytes([int(match[1], 16)])
            else:
                pieces[i] = piece.replace("▁", " ").encode("utf-8")
        if lost := _UTF8 - {piece[0] for piece in pieces if len(piece) == 1}:
            raise UserError(
                f"tokenizer {self._name} has no entry for {len(lost)} of the bytes that occur in texts, such as "
                f"0x{min(lost):02X}, and loses them: choose another tokenizer"
            )
        return pieces

    def _find_lead(self) -> tuple[str, list[int]]:
        """A lead, which is put before every text to encode, and its ids, which are removed again. It is needed for
        tokenizers that add a space before a text, which would change its bytes, and empty for most others."""
        probe = self._backend.encode("a", add_special_tokens=False).ids
        if b"".join(self.token_bytes[i] for i in probe) == b"a":
            return "", []
        for lead in _LEADS:
            ids = self._backend.encode(lead, add_special_tokens=False).ids
            behind = self._backend.encode(lead + "a", add_special_tokens=False).ids
            whole = b"".join(self.token_bytes[i] for i in behind[len(ids) :]) == b"a"
            # Where an entry contains the lead and more after it, lead and start of a text could merge into one id.
            merges = any(lead.encode() in piece[:-1] for piece in self.token_bytes)
            if behind[: len(ids)] == ids and whole and not merges:
                return lead, ids
        raise self._changes_text()

    def _changes_text(self) -> UserError:
        return UserError(
            f"tokenizer {self._name} changes the text that it encodes; expected one that keeps every byte: choose "
            "another tokenizer"
        )


def _table_size(vocabulary: dict[str, int], name: str) -> int:
    """One more than the largest id; published tokenizers may skip ids. Raises UserError for a damaged vocabulary."""
    size = max(vocabulary.values(), default=0) + 1
    if size > _MOST_IDS * len(vocabulary):
        raise UserError(f"tokenizer {name} has {len(vocabulary)} entries, but the id {size - 1}; it is damaged")
    names: dict[int, str] = {}
    for piece, i in vocabulary.items():
        if names.setdefault(i, piece) != piece:
            raise UserError(f"tokenizer {name} has the id {i} for both {names[i]!r} and {piece!r}; it is damaged")
    return size


def _mark_specials(tokenizer: Any, backend: Any) -> None:
    """Marks the pieces that are special to this package as special. Some published tokenizers do not, and would produce
    them from user text."""
    from tokenizers import AddedToken

    names = {name for aliases in _ALIASES.values() for name in aliases}
    for token in tokenizer.added_tokens_decoder.values():
        if token.content in names and not token.special:
            flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "normalized")}
            backend.add_special_tokens([AddedToken(token.content, special=True, **flags)])


def read_hugging_face(name: str) -> HuggingFaceTokenizer:
    """The tokenizer in a folder, or a published tokenizer by its name on the hub.

    Raises UserError that says why it cannot be loaded and what to do.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"tokenizer.kind=hf needs transformers ({error}): pip install 'smallcoder_jax[hub]'") from error
    looks_local = os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    where = str(Path(name).expanduser()) if looks_local else name
    if looks_local:
        _check_files(Path(where))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=looks_local)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # an invalid file raises a bare Exception, and a panic in Rust only a BaseException
        raise UserError(
            f"tokenizer {name!r} cannot be loaded: {error}. Three ways out: name a folder that holds tokenizer.json or "
            "tokenizer.model; download it elsewhere with `hf download` and set HF_HOME to that cache (or HF_ENDPOINT "
            "to a mirror); train one here with tokenizer.kind=sentencepiece and an empty tokenizer.path"
        ) from error
    return HuggingFaceTokenizer(tokenizer, name)


def _check_files(folder: Path) -> None:
    """Raises UserError for a file on which the library would hang, run out of memory or fail with a traceback."""
    for path in (folder / name for name in _FILES):
        if path.suffix == ".json" and os.path.exists(path):
            read_json(path, "a file of a published tokenizer; download it again")
        elif os.path.exists(path):
            read_bytes(path, "a file of a published tokenizer; download it again")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible characters for the 256 byte values: printable bytes map to themselves, the rest from U+0100
    on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + i): value for i, value in enumerate(rest)}
