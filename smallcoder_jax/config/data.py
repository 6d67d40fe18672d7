"""What is learned from: documents, tokens, conversations and pairs of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from smallcoder_jax.config.fields import LARGEST_SEED, Section, number


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Section):
    """`sentencepiece`: trained here unless `path` names a folder. `bytes`: raw UTF-8. `hf`: the folder `path`."""

    kind: Literal["sentencepiece", "bytes", "hf"] = "sentencepiece"
    path: str = ""
    # How much of the training split sentencepiece is trained on.
    train_bytes: int = number(30_000_000, low=1, high=2**63 - 1)

    def problems(self) -> Iterator[str]:
        if self.kind == "hf" and not self.path:
            yield "tokenizer.kind='hf' needs tokenizer.path: the folder of a published tokenizer"


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Where documents come from and how they become rows of tokens.

    `sources`: comma-separated `SPEC[@WEIGHT][!nofim]`, SPEC one of `stdlib` (the running Python's library, without its
    tests), `installed`, `prose` (what the installed packages say of themselves), `dir:PATH[?ignored=keep]`,
    `jsonl:PATH`, `parquet:PATH` (a path with one of these signs in it can be quoted: `dir:"a, b"`), `tfds:NAME`,
    `hf:NAME[?config=..&split=..&column=..&streaming=1]`. Weights are per token.
    """

    sources: str = "hf:bigcode/the-stack-smol"
    dir: str = "data"  # prepared corpora, tokenizers and token shards; shared between runs
    workers: int = number(0, low=0, high=1024, zero="a thread of this process")  # reader processes
    prefetch: int = number(2, low=1, high=1024)  # batches kept ready on the device
    packing: Literal["concat", "best_fit", "document"] = "concat"  # document: a row is the beginning of one document
    min_tokens: int = number(16, low=1)  # packing=document: a document with fewer is unusable, and passed over
    max_unusable: int = number(1000, low=1)  # packing=document: so many unusable ones in a row end reading or training
    fim_rate: float = number(0.5, low=0, high=1)  # share of documents rearranged for fill-in-the-middle
    fim_spm_share: float = number(0.5, low=0, high=1)  # of those, suffix first (SPM); the rest prefix first (PSM)
    repository_order: bool = False  # one document per repository, files in dependency order
    validation_fraction: float = number(0.05, above=0, below=1)
    min_characters: int = number(50, low=0)  # shorter documents are dropped, after stripping
    max_documents: int = number(0, low=0, zero="all")  # stop after this many kept documents per source
    allow_dummy_data: bool = False  # generated text where a source cannot be read; marked, and verification fails it


@dataclasses.dataclass(frozen=True)
class DialogConfig(Section):
    """Conversations of stage sft: generated, calling functions that are really executed; or questions and answers."""

    source: str = ""  # "": generated; jsonl:PATH, parquet:PATH or hf:NAME: rows of questions and answers, or of talks
    count: int = number(20_000, low=0)  # conversations, a tenth of them held out; 0: all of the source
    seed: int = number(0, low=0, high=LARGEST_SEED)  # of those that are generated
    packed: bool = True  # several to a row, where they fit; False: one to a row

    def problems(self) -> Iterator[str]:
        if not self.count and not self.source:
            yield "dialogs.count=0 must be at least 1; 0 is all of dialogs.source, which is not set"


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(Section):
    """Pairs of a better and a worse answer, for the stages `reward` and `dpo`.

    `sources`: some of `code` (functions of the Python documents of `data.sources`), `conversations` (generated ones
    that call functions) and `jsonl:PATH` (prompt, chosen, rejected; a string each, or messages).
    """

    sources: str = "code,conversations"
    count: int = number(4000, low=1)  # most training pairs of `code` and of `conversations`; a tenth more is held out
    seed: int = number(0, low=0, high=LARGEST_SEED)  # of the pairs; their order in training is that of train.seed
