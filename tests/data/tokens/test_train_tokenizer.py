"""The tokenizer of several sources: conversations make calls short, and take no more than their part."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import smallcoder_jax
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.tokens.train_tokenizer import CONVERSATIONS_SHARE, make_tokenizer
from smallcoder_jax.tokenizers.base import Tokenizer

CALL = '{"name": "execute_python", "arguments": {"code": "print(%d)"}}\n'


CODE = Path(smallcoder_jax.__file__).parent / "data"


def trained(root: Path, train_bytes: int, conversations: Iterable[str]) -> Tokenizer:
    data = DataConfig(sources=f"dir:{CODE}", dir=str(root / "data"), validation_fraction=0.2)
    return make_tokenizer(data, 1000, train_bytes, Progress(io.StringIO()), conversations)[0]


def test_calls_take_fewer_ids_where_conversations_were_read(tmp_path: Path) -> None:
    said = [CALL % number for number in range(100)]
    without, beside = (trained(tmp_path, 1_000_000, texts) for texts in ((), said))
    call, code = CALL % 7, "def add(value):\n    return value + 6\n"
    assert len(beside.encode(call)) < 0.6 * len(without.encode(call))
    assert len(beside.encode(code)) <= len(without.encode(code)) + 2


def test_conversations_are_a_part_of_the_bytes_at_most(tmp_path: Path) -> None:
    train_bytes = CONVERSATIONS_SHARE * 300 * len(CALL % 100)
    read: list[int] = []

    def conversations() -> Iterable[str]:
        for number in range(100, 999):
            read.append(number)
            yield CALL % number

    tokenizer = trained(tmp_path, train_bytes, conversations())
    assert read[:-1] == list(range(100, 400))  # the next one is looked at, and left out
    assert tokenizer.hash == trained(tmp_path, train_bytes, [CALL % number for number in range(100, 400)]).hash
    assert tokenizer.hash != trained(tmp_path, train_bytes, [CALL % number for number in range(100, 101)]).hash
