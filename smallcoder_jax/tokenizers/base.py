"""The interface of every tokenizer, and the special pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np

# Each piece is one id that encoding never produces from user text. `<pad>` is not `</s>`, because a model that pads
# with the end-of-text id never learns to stop.
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"
REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TOOL_PIECES = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPARE_PIECES = tuple(f"<|spare_{i}|>" for i in range(8))
SPECIAL_PIECES = (
    FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD, REPO_NAME, FILE_SEP, IM_START, IM_END, *TOOL_PIECES, *SPARE_PIECES,
)  # fmt: skip

# A completion ends with the document, with a turn of a chat, or, where documents are repositories, with the file.
END_PIECES = (EOS, IM_END, FILE_SEP)

# A text that is changed by Unicode normalisation, lower-casing, stripping or merging of whitespace, or by a vocabulary
# that lacks bytes.
PROBE = "  Ae\u0301  \u212b\ufb01\u3000 \t\r\n\n x\n\n"
KIND_FILE = "tokenizer_kind.json"


class Tokenizer(Protocol):
    """Converts text to ids and back.

    `vocab_size` is one more than the largest id. `specials` maps every special piece that this tokenizer has to its id.
    `token_bytes[i]` is the UTF-8 that id i stands for. It is empty for specials and for ids that a published tokenizer
    does not use, so that concatenating it over a document's ids gives the document's bytes.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    specials: dict[str, int]
    token_bytes: list[bytes]
    hash: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as user text: special pieces that are written out in it are ordinary characters. Adds no
        BOS and no EOS."""
        ...

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """`encode` of every text, on several threads."""
        ...

    def borders(self, ids: np.ndarray) -> np.ndarray:
        """For each id, whether the position before it is a border (bool): no id can cover the bytes on both its sides.

        Where a text is changed on one side of a border, the ids on the other side therefore still stand for their
        bytes. They are also the ids that encoding the changed text gives, except for tokenizers that first split a text
        by a regular expression that looks across the border (byte-level BPE, at whitespace). The end of a line is a
        border.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`. Specials are omitted, and invalid UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` restores this tokenizer."""
        ...


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids at which a completion ends, with the end of a document first."""
    ends = [tokenizer.specials[piece] for piece in END_PIECES if piece in tokenizer.specials]
    return list(dict.fromkeys([tokenizer.eos_id, *ends]))


def unused_ids(tokenizer: Tokenizer, table: int) -> list[int]:
    """The ids of a model's embedding table of `table` rows that stand for nothing: gaps in the tokenizer's ids, and
    rows after its last id."""
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.specials.values()}
    gaps = [i for i, piece in enumerate(tokenizer.token_bytes) if not piece and i not in special]
    return [*gaps, *range(tokenizer.vocab_size, table)]


def write_kind(folder: Path, kind: str) -> None:
    """Records in `folder` which kind of tokenizer it holds, for `load_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KIND_FILE).write_text(json.dumps({"kind": kind}) + "\n", encoding="utf-8")
