"""A tokenizer whose ids are the bytes of the UTF-8 text.

The values 245 to 255 occur in no UTF-8 text, so they are the ids of the special pieces: the vocabulary stays at 256,
and no text can ever produce a special piece. Padding has its own id and is also masked everywhere. There are not enough
of these values for the pieces around function calls, so those have the ids from 256 on, in a larger vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.vocabulary import Vocabulary

SPECIALS = {
    base.FIM_PREFIX: 245,
    base.FIM_MIDDLE: 246,
    base.FIM_SUFFIX: 247,
    base.FIM_PAD: 248,
    base.REPO_NAME: 249,
    base.FILE_SEP: 250,
    base.IM_START: 251,
    base.IM_END: 252,
    base.PAD: 253,
    base.BOS: 254,
    base.EOS: 255,
}


TOOL_SPECIALS = {piece: 256 + index for index, piece in enumerate(base.TOOL_PIECES)}


class ByteTokenizer:
    """Implements `base.Tokenizer` over the 256 byte values, and with `tools` over the pieces around function calls."""

    def __init__(self, *, tools: bool = False) -> None:
        self._kind = "bytes_tools" if tools else "bytes"
        self.specials = {**SPECIALS, **(TOOL_SPECIALS if tools else {})}
        self.vocab_size = max(self.specials.values()) + 1
        self.pad_id, self.bos_id, self.eos_id = SPECIALS[base.PAD], SPECIALS[base.BOS], SPECIALS[base.EOS]
        unused = set(self.specials.values())
        self._vocabulary = Vocabulary([b"" if i in unused else bytes([i]) for i in range(self.vocab_size)])
        self.token_bytes = self._vocabulary.token_bytes
        self.hash = hashlib.sha256(f"bytes|{sorted(self.specials.items())}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        del threads  # copying bytes would not be faster on several threads
        return [self.encode(text) for text in texts]

    def borders(self, ids: np.ndarray) -> np.ndarray:
        return self._vocabulary.borders(ids)

    def decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        base.write_kind(folder, self._kind)
