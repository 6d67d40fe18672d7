"""Conversations from the rows of a data set: questions and answers, or whole conversations (see `given_rows`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from smallcoder_jax.base.artifacts import short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.conversations import given_rows
from smallcoder_jax.data.conversations.record import Record, side_of
from smallcoder_jax.data.conversations.store import Dialogs, open_dialogs, write_dialogs
from smallcoder_jax.data.sources import tables
from smallcoder_jax.data.sources.cells import Account, Row, valid_text
from smallcoder_jax.data.sources.row_files import find_files
from smallcoder_jax.data.sources.spec import SourceSpec, parse_sources, source_identity
from smallcoder_jax.tokenizers.chat import to_json
from smallcoder_jax.tokenizers.chat_wire import to_wire

FORMAT = 3  # increased whenever the same rows start to give other conversations
_KINDS = ("jsonl", "parquet", "hf")


def prepare_dialogs(root: Path, source: str, count: int, progress: Progress | None = None) -> Dialogs:
    """The first `count` usable conversations of `source` (0: all). They are stored under `root`, and made where they do
    not exist yet.

    Rows that give no conversation and duplicates are unusable; they are counted, and the first three are named. The
    side of the split is determined by a hash of what the user says. Raises UserError for a source that cannot be read
    or has no usable row.
    """
    spec = _spec_of(source)
    folder = root.expanduser() / "dialogs" / short_key([FORMAT, source_identity(spec, root), count])
    if not folder.is_dir():
        if progress:
            progress.start(f"conversations of {spec.text}")
        account = Account(f"dialogs.source={spec.text}", given_rows.EXPECTED)
        records = _records(spec, _rows(spec, progress), count, account)
        write_dialogs(folder, records, f"conversations of {spec.text}", progress, account)
    return open_dialogs(folder)


def _spec_of(source: str) -> SourceSpec:
    specs = parse_sources(source)
    if len(specs) != 1 or specs[0].kind not in _KINDS:
        raise UserError(
            f"dialogs.source={source!r}: expected one of {', '.join(f'{kind}:...' for kind in _KINDS)}, whose rows "
            f"have {given_rows.EXPECTED}"
        )
    if "column" in dict(specs[0].options):
        raise UserError(f"dialogs.source={source!r}: conversations are in known columns; leave out column")
    return specs[0]


def _rows(spec: SourceSpec, progress: Progress | None) -> Iterable[Row]:
    options = dict(spec.options)
    if spec.kind == "hf":
        return tables.hugging_face_rows(spec.text, spec.location, options, given_rows.WANTED)
    files = find_files(spec.text, spec.kind, spec.location, options.get("split"))
    if progress and files.note:
        progress.note(files.note)
    return files.rows(given_rows.WANTED)


def _records(spec: SourceSpec, rows: Iterable[Row], count: int, account: Account) -> Iterator[Record]:
    """A record for each usable row, up to `count` records. The account counts the other rows."""
    seen: set[bytes] = set()
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            conversation, loose = given_rows.conversation_of(row.columns)
        except (UserError, ValueError) as error:
            account.add_bad(row, str(error))
            continue
        digest = hashlib.sha256(to_json(to_wire(conversation), row.place).encode()).digest()
        if digest in seen:
            account.add_bad(row, "the same as an earlier row")
            continue
        seen.add(digest)
        account.add_used()
        account.notes["calls without arguments"] += loose
        said = "\n".join(message.content for message in conversation.messages if message.role == "user")
        yield Record(conversation, side_of(said), {"source": valid_text(spec.text), "row": row.place})
        if len(seen) == count:
            return
