"""A tokenizer whose ids are the bytes of the UTF-8 text.

The values 245 to 255 occur in no UTF-8 text, so they are the ids of the special pieces: the vocabulary stays at 256,
and no text can ever produce a special piece. Padding has its own id and is also masked everywhere.
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


class ByteTokenizer:
    """Implements `base.Tokenizer` over the 256 byte values."""

    def __init__(self) -> None:
        self.vocab_size = 256
        self.pad_id, self.bos_id, self.eos_id = SPECIALS[base.PAD], SPECIALS[base.BOS], SPECIALS[base.EOS]
        self.specials = dict(SPECIALS)
        unused = set(SPECIALS.values())
        self._vocabulary = Vocabulary([b"" if i in unused else bytes([i]) for i in range(256)])
        self.token_bytes = self._vocabulary.token_bytes
        self.hash = hashlib.sha256(f"bytes|{sorted(SPECIALS.items())}".encode()).hexdigest()

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
        base.write_kind(folder, "bytes")
