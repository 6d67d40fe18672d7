"""Loads tokenizers from folders, and checks that a tokenizer fits a model and its data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object
from smallcoder_jax.tokenizers.base import KIND_FILE, Tokenizer
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.huggingface import read_hugging_face
from smallcoder_jax.tokenizers.sentencepiece import read_sentencepiece

KINDS = ("sentencepiece", "bytes", "bytes_tools", "hf")
_MOST_SPARE = 8  # at most 1 / 8 of a model's table may be spare: published tables are padded to a round size


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in `folder`. Raises UserError where there is none, or where it cannot be read."""
    path = folder / KIND_FILE
    if not os.path.exists(path):
        raise UserError(
            f"{folder} is no tokenizer's folder: {path.name} does not exist. Name one that tools.train_tokenizer or "
            "tools.prepare_data has written"
        )
    return open_tokenizer(read_kind(folder), str(folder))


def read_kind(folder: Path) -> str:
    """The kind of the tokenizer that was saved in `folder`. Raises UserError where the kind cannot be read."""
    path = folder / KIND_FILE
    kind = read_json_object(path, "the kind of a tokenizer. Write the tokenizer again").get("kind")
    if not isinstance(kind, str):
        raise UserError(f"{path} names no kind; expected one of {', '.join(KINDS)}. Write the tokenizer again")
    return kind


def open_tokenizer(kind: str, path: str) -> Tokenizer:
    """The tokenizer of this kind in the folder `path` (for `hf`, also the name of a published tokenizer)."""
    if kind in ("bytes", "bytes_tools"):
        return ByteTokenizer(tools=kind == "bytes_tools")
    if kind == "sentencepiece":
        return read_sentencepiece(Path(path))
    if kind == "hf":
        return read_hugging_face(path)
    raise UserError(f"tokenizer kind {kind!r} in {path} is not known; expected one of {', '.join(KINDS)}")


def check_tokenizer(
    tokenizer: Tokenizer, vocab_size: int, prepared_hash: str | None = None, folders: Sequence[Path] = ()
) -> None:
    """Raises UserError where the tokenizer does not fit the model's table of `vocab_size` rows, or is not the tokenizer
    that the data in `folders` was prepared with. A table may have some spare rows, which occur in no text and no
    completion; `spare_rows` describes them.
    """
    if not 0 <= vocab_size - tokenizer.vocab_size <= vocab_size // _MOST_SPARE:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, but model.vocab_size={vocab_size}: set "
            f"model.vocab_size={tokenizer.vocab_size} or name another tokenizer"
        )
    if prepared_hash is not None and tokenizer.hash != prepared_hash:
        raise UserError(
            f"the tokenizer changed since the data was prepared: its hash is {tokenizer.hash[:12]}, the token shards "
            f"were made with {prepared_hash[:12]}. Put the old tokenizer back, or delete "
            f"{' and '.join(map(str, folders))}; then run the same command again"
        )


def spare_rows(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """A notice about a model's table with more rows than the tokenizer has entries; None where the numbers are
    equal."""
    spare = vocab_size - tokenizer.vocab_size
    if not spare:
        return None
    return (
        f"model.vocab_size={vocab_size} and the tokenizer has {tokenizer.vocab_size} entries: {spare} rows are spare, "
        "which no text contains and no completion"
    )
