"""Stores conversations as JSON lines under `data.dir`.

dialogs/KEY/train.jsonl, validation.jsonl    one `record.Record` per line
dialogs/KEY/dialogs.json                     counts, the first unusable rows, checksums and fingerprint
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from smallcoder_jax.base.artifacts import check_sealed, new_folder, sealed
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, parse_json, read_json_object, reason, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.conversations.record import Record
from smallcoder_jax.data.sources.cells import Account
from smallcoder_jax.data.sources.document import SPLITS

_FACTS, _FILES = "dialogs.json", tuple(f"{side}.jsonl" for side in SPLITS)


@dataclasses.dataclass(frozen=True)
class Dialogs:
    """Stored conversations by their side of the split. `counts` and `fingerprint` describe the files in `folder`.
    `unusable` holds the first rows that gave no conversation, with the reason."""

    folder: Path
    fingerprint: str
    counts: dict[str, int]
    unusable: tuple[str, ...] = ()

    def read(self, side: str) -> list[Record]:
        """The records of a side, in order. Raises UserError for a line that is not a record."""
        path = self.folder / f"{side}.jsonl"
        try:
            with open_regular(path) as lines:
                return [Record.from_json(parse_json(line.decode("utf-8"))) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {reason(error)}. Delete {self.folder}") from error


def write_dialogs(
    folder: Path, records: Iterable[Record], what: str, progress: Progress | None = None, account: Account | None = None
) -> None:
    """Stores the records in `folder`, which appears only when it is complete, together with the counts that `account`
    has after all records were read.

    Raises UserError, in which `what` names the records, where one side of the split is empty.
    """
    with new_folder(folder) as temporary, contextlib.ExitStack() as stack:
        written: collections.Counter[str] = collections.Counter(dict.fromkeys(SPLITS, 0))
        files = {
            side: stack.enter_context((temporary / f"{side}.jsonl").open("w", encoding="utf-8", newline="\n"))
            for side in SPLITS
        }
        for record in records:
            line = json.dumps(record.to_json(), ensure_ascii=False) + "\n"
            files[record.side].write(line)
            written[record.side] += 1
            if progress:
                progress.add(len(line.encode("utf-8")))
        stack.close()
        if account:
            account.check()
            written.update(collections.Counter(unusable=account.bad) + account.notes)
        if not all(written[side] for side in SPLITS):
            raise UserError(f"{what}: {dict(written)}; both sides of the split need some, give more conversations")
        facts = {"counts": dict(written), "unusable": account.named if account else []}
        write_json(temporary / _FACTS, {**facts, **sealed(temporary, _FILES)})
    if progress:
        progress.finish()
        if account and account.bad:
            progress.note(account.line())


def open_dialogs(folder: Path) -> Dialogs:
    """The conversations that `write_dialogs` stored. Raises UserError where the files have changed since."""
    facts = read_json_object(folder / _FACTS, f"the account of conversations; delete {folder}")
    check_sealed(folder, facts, _FILES, "conversations")
    counts, unusable = facts.get("counts", {}), facts.get("unusable", [])
    known = isinstance(counts, dict) and isinstance(unusable, list) and all(isinstance(line, str) for line in unusable)
    if not known or not all(type(counts.get(side)) is int for side in SPLITS):
        raise UserError(f"{folder / _FACTS} has another form than what was written. Delete the folder {folder}")
    return Dialogs(folder, facts["fingerprint"], counts, tuple(unusable))
