"""Encodes documents, or whole repositories, as ids with BOS and EOS."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.sources.document import Document
from smallcoder_jax.data.tokens.repository import group_repositories
from smallcoder_jax.tokenizers.base import FILE_SEP, REPO_NAME, Tokenizer

_BATCH = 64  # texts encoded in one call


class DocumentEncoder:
    """Makes one record of every document or, with `repository_order`, of every repository.

    A repository is encoded as `<|repo_name|>` and its name, then for every file `<|file_sep|>`, the path, a newline and
    the text.
    Raises UserError for a tokenizer without these pieces.
    """

    def __init__(self, tokenizer: Tokenizer, repository_order: bool):
        missing = [piece for piece in (REPO_NAME, FILE_SEP) if piece not in tokenizer.specials]
        if repository_order and missing:
            raise UserError(
                f"data.repository_order=True needs a tokenizer with {', '.join(missing)}, which this one lacks; set "
                "data.repository_order=False or use a tokenizer that has them"
            )
        self._tokenizer, self._repository_order = tokenizer, repository_order
        self._threads = os.cpu_count() or 1

    def groups(self, documents: Iterable[Document]) -> Iterator[tuple[Document, ...]]:
        """The documents of each record, in the order of the records."""
        if self._repository_order:
            return group_repositories(documents)
        return ((document,) for document in documents)

    def parts(self, group: tuple[Document, ...]) -> list[tuple[int | None, str]]:
        """The texts of a record, each with the special id that precedes it, or None."""
        if not self._repository_order or not group[0].repository:
            return [(None, document.text) for document in group]
        specials = self._tokenizer.specials
        files = [(specials[FILE_SEP], f"{document.path}\n{document.text}") for document in group]
        return [(specials[REPO_NAME], group[0].repository), *files]

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of every record, and the number of UTF-8 bytes of the texts that they stand for."""
        tokenizer = self._tokenizer
        groups = self.groups(documents)
        while batch := list(itertools.islice(groups, _BATCH)):
            records = [self.parts(group) for group in batch]
            encoded = self._encode([text for parts in records for _, text in parts])
            for parts in records:
                pieces = [np.array([tokenizer.bos_id])]
                for special, _ in parts:
                    if special is not None:
                        pieces.append(np.array([special]))
                    pieces.append(next(encoded))
                ids = np.concatenate([*pieces, np.array([tokenizer.eos_id])])
                yield ids, sum(len(text.encode("utf-8")) for _, text in parts)

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        # In batches, because a repository may have thousands of files, whose ids as lists would take gigabytes.
        for start in range(0, len(texts), _BATCH):
            for ids in self._tokenizer.encode_batch(texts[start : start + _BATCH], self._threads):
                yield np.array(ids, np.int32)
