"""Conversations of a question and its answer, from rows: Alpaca's instruction, input and output, or the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data import tables
from smallcoder_jax.data.conversations import Record, side_of
from smallcoder_jax.data.progress import Progress
from smallcoder_jax.data.sources import SourceSpec, parse_sources, source_identity
from smallcoder_jax.data.storage import short_key
from smallcoder_jax.data.tool_dialogs import Dialogs, open_dialogs, write_dialogs
from smallcoder_jax.tokenizers.chat import Conversation, Message

FORMAT = 1  # raised when the same rows begin to give other conversations
_READERS = {"jsonl": tables.jsonl_rows, "parquet": tables.parquet_rows, "hf": tables.hugging_face_rows}
# The first of each that a row has.
_ASKED = ("instruction", "question", "prompt")
_ANSWERED = ("output", "answer", "completion")


def prepare_dialogs(root: Path, source: str, count: int, progress: Progress | None = None) -> Dialogs:
    """The first `count` usable conversations of `source` (0: all), under `root`, made where they are not there yet.

    A row without a question or an answer, and one that is there twice, is unusable and counted. The side of the split
    is by a hash of the question. Raises UserError for a source that cannot be read or has other columns.
    """
    spec = _spec_of(source)
    folder = root.expanduser() / "dialogs" / short_key([FORMAT, source_identity(spec, root), count])
    if not folder.is_dir():
        if progress:
            progress.start(f"conversations of {spec.text}")
        write_dialogs(folder, _records(spec, count), f"conversations of {spec.text}", progress)
    return open_dialogs(folder)


def _spec_of(source: str) -> SourceSpec:
    specs = parse_sources(source)
    if len(specs) != 1 or specs[0].kind not in _READERS:
        raise UserError(
            f"dialogs.source={source!r}: expected one of {', '.join(f'{kind}:...' for kind in _READERS)}, whose rows "
            f"have {_ASKED[0]}, input and {_ANSWERED[0]}"
        )
    return specs[0]


def _records(spec: SourceSpec, count: int) -> Iterator[Record | None]:
    """A record for each usable row, None for another, until `count` were usable."""
    seen: set[tuple[str, str]] = set()
    for name, rows in _READERS[spec.kind](spec.text, spec.location, dict(spec.options)):
        for number, row in enumerate(rows):
            pair = _pair(spec, row)
            if pair is None or pair in seen:
                yield None
                continue
            seen.add(pair)
            asked, answered = pair
            conversation = Conversation((Message("user", asked), Message("assistant", answered)))
            yield Record(conversation, side_of(asked), {"source": spec.text, "row": f"{name}:{number}"})
            if len(seen) == count:
                return


def _pair(spec: SourceSpec, row: Any) -> tuple[str, str] | None:
    """Question and answer of a row; None where it has none."""
    if not isinstance(row, Mapping):
        return None
    names = [next((name for name in known if name in row), None) for known in (_ASKED, _ANSWERED)]
    if None in names:
        raise UserError(
            f"dialogs.source={spec.text}: a row has the columns {', '.join(map(str, row)) or 'none'}; expected one of "
            f"{', '.join(_ASKED)}, perhaps input, and one of {', '.join(_ANSWERED)}"
        )
    asked, more, answered = (_text(row.get(name)) for name in (names[0], "input", names[1]))
    if not asked or not answered:
        return None
    return "\n\n".join(filter(None, (asked, more))), answered


def _text(value: Any) -> str:
    """A text without space around it; empty for what is none, or what UTF-8 cannot hold."""
    try:
        return value.encode("utf-8").decode("utf-8").strip() if isinstance(value, str) else ""
    except UnicodeError:
        return ""
