"""Counts over the documents of a corpus."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from smallcoder_jax.data.sources.document import Document

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


class DocumentStatistics:
    """Languages, licences and lengths of kept documents."""

    def __init__(self) -> None:
        self._languages: collections.Counter[str] = collections.Counter()
        self._licenses: collections.Counter[str] = collections.Counter()
        self._lengths: list[int] = []

    def add(self, document: Document, size: int) -> None:
        """Counts a document of `size` UTF-8 bytes."""
        self._languages[document.language or "unknown"] += 1
        self._licenses[document.license or "unknown"] += 1
        self._lengths.append(size)

    def summary(self) -> dict[str, Any]:
        """The counts as JSON values; lengths are in UTF-8 bytes."""
        marks = np.percentile(self._lengths, PERCENTILES, method="nearest") if self._lengths else ()
        return {
            "languages": dict(sorted(self._languages.items())),
            "licenses": dict(sorted(self._licenses.items())),
            "length_percentiles": {str(p): int(mark) for p, mark in zip(PERCENTILES, marks, strict=False)},
        }
