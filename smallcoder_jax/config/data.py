"""Settings of the training data: documents, tokens, conversations and pairs of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from smallcoder_jax.config.fields import LARGEST_SEED, Section, number


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """`sentencepiece`: trained here unless `path` names a folder. `bytes`: raw UTF-8, 256 entries. `bytes_tools`: also
    the pieces around function calls, 260 entries. `hf`: a published tokenizer, read from the folder `path`."""

    kind: Literal["sentencepiece", "bytes", "bytes_tools", "hf"] = "sentencepiece"
    path: str = ""
    # How much of the training split sentencepiece is trained on.
    train_bytes: int = number(30_000_000, low=1, high=2**63 - 1)

    @property
    def is_trained(self) -> bool:
        """Whether it is trained on the run's own documents."""
        return self.kind == "sentencepiece" and not self.path

    @property
    def entries(self) -> int | None:
        """The number of entries, where the kind determines it."""
        return {"bytes": 256, "bytes_tools": 260}.get(self.kind)

    def problems(self) -> Iterator[str]:
        if self.kind == "hf" and not self.path:
            yield "tokenizer.kind='hf' needs tokenizer.path: the folder of a published tokenizer"


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Where documents come from and how they become rows of tokens.

    `sources`: comma-separated `SPEC[@WEIGHT][!nofim]`, where SPEC is one of `stdlib` (the running Python's standard
    library, without its tests), `installed`, `prose` (the documentation of the installed packages),
    `dir:PATH[?ignored=keep]`, `jsonl:PATH`, `parquet:PATH` (a path that contains one of these special characters can be
    quoted: `dir:"a, b"`), `tfds:NAME`, `hf:NAME[?config=..&split=..&column=..&streaming=1]`. Weights are per token.
    """

    sources: str = "hf:bigcode/the-stack-smol"
    dir: str = "data"  # prepared corpora, tokenizers and token shards; shared between runs
    workers: int = number(0, low=0, high=1024, zero="a thread of this process")  # processes that read the data
    prefetch: int = number(2, low=1, high=1024)  # batches kept ready on the device
    packing: Literal["concat", "best_fit", "document"] = "concat"  # document: a row is the beginning of one document
    min_tokens: int = number(16, low=1)  # packing=document: a document with fewer tokens is unusable and skipped
    max_unusable: int = number(1000, low=1)  # packing=document: reading or training ends after this many in a row
    fim_rate: float = number(0.5, low=0, high=1)  # share of documents rearranged for fill-in-the-middle
    fim_spm_share: float = number(0.5, low=0, high=1)  # share of these with the suffix first (SPM); else prefix (PSM)
    repository_order: bool = False  # one document per repository, files in dependency order
    validation_fraction: float = number(0.05, above=0, below=1)
    # Share of the documents that is held out from evaluations during training too, for `eval.split`.
    test_fraction: float = number(0.0, low=0, below=1, zero="no test documents")
    min_characters: int = number(50, low=0)  # documents that are shorter after stripping are dropped
    max_documents: int = number(0, low=0, zero="all")  # stop after this many kept documents per source
    allow_dummy_data: bool = False  # generate text where a source cannot be read; the run is marked, verification fails

    def problems(self) -> Iterator[str]:
        if self.validation_fraction + self.test_fraction >= 1:
            yield (
                f"data.validation_fraction={self.validation_fraction} and data.test_fraction={self.test_fraction} must "
                "be less than 1 together: the rest is for training"
            )


@dataclasses.dataclass(frozen=True)
class DialogConfig(Section):
    """Conversations for the stage sft: generated ones whose function calls are really executed, or a data set of
    questions and answers or conversations."""

    # "": generated; jsonl:PATH, parquet:PATH or hf:NAME: rows of questions and answers, or of conversations.
    source: str = ""
    count: int = number(20_000, low=0)  # conversations, a tenth of them held out; 0: all of the source
    seed: int = number(0, low=0, high=LARGEST_SEED)  # for generated conversations
    packed: bool = True  # several conversations per row, where they fit; False: one per row

    def problems(self) -> Iterator[str]:
        if not self.count and not self.source:
            yield "dialogs.count=0 must be at least 1; 0 means all of dialogs.source, which is not set"


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(Section):
    """Pairs of a better and a worse answer, for the stages `reward` and `dpo`.

    `sources`: comma-separated, any of `code` (functions from the Python documents of `data.sources`), `conversations`
    (generated conversations that call functions) and `jsonl:PATH` (rows of prompt, chosen and rejected, each a string
    or a list of messages).
    """

    sources: str = "code,conversations"
    count: int = number(4000, low=1)  # most training pairs of each of `code` and `conversations`; plus a tenth held out
    seed: int = number(0, low=0, high=LARGEST_SEED)  # for making the pairs; train.seed decides their order in training
