"""Conversations kept as JSON lines under `data.dir`; and those that call functions, made once and kept there.

dialogs/KEY/train.jsonl, validation.jsonl    a `conversations.Record` a line
dialogs/KEY/dialogs.json                     counts, the first rows that were of no use, checksums and fingerprint
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smallcoder_jax.base.artifacts import check_sealed, new_folder, sealed, short_key
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, parse_json, read_json_object, reason, write_json
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.conversations import FORMAT, Draft, Record, complete, draw
from smallcoder_jax.data.rows import Account
from smallcoder_jax.toolbox.functions import Execute

SIDES: tuple[str, ...] = ("train", "validation")
_FACTS, _FILES = "dialogs.json", tuple(f"{side}.jsonl" for side in SIDES)
_STORE = 2  # raised when these files change their form


@dataclasses.dataclass(frozen=True)
class Dialogs:
    """Conversations by their side of the split. `counts` and `fingerprint`: of the files in `folder`. `unusable`: the
    first rows that gave none, with the reason."""

    folder: Path
    fingerprint: str
    counts: dict[str, int]
    unusable: tuple[str, ...] = ()

    def read(self, side: str) -> list[Record]:
        """The records of a side, in order. Raises UserError for a line that is none."""
        path = self.folder / f"{side}.jsonl"
        try:
            with open_regular(path) as lines:
                return [Record.from_json(parse_json(line.decode("utf-8"))) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {reason(error)}. Delete {self.folder}") from error


def prepare_tool_dialogs(
    root: Path, count: int, seed: int, execute: Execute, progress: Progress | None = None
) -> Dialogs:
    """`count` conversations of different requests under `root`, made where they are not there yet.

    They are those of the first indices of the seed, whatever the machine; the calls are really made, several at a time.
    Raises UserError where this machine cannot run them, and on a full disk.
    """
    version = platform.python_version()
    folder = root.expanduser() / "dialogs" / short_key([_STORE, FORMAT, version, count, seed])
    if not folder.is_dir():
        if progress:
            progress.start(f"conversations, whose calls are executed, {count:,}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            drafts = list(different(seed, count))  # drawn first: it parses code, which one thread at a time may
            records = pool.map(lambda draft: complete(draft, execute), drafts)
            write_dialogs(folder, records, f"{count:,} generated conversations", progress)
    return open_dialogs(folder)


def write_dialogs(
    folder: Path, records: Iterable[Record], what: str, progress: Progress | None = None, account: Account | None = None
) -> None:
    """Stores the records in `folder`, which appears when it is whole; with what is in `account` once they are drawn.

    Raises UserError, naming `what` they are, where one side of the split stays empty.
    """
    with new_folder(folder) as temporary, contextlib.ExitStack() as stack:
        written: collections.Counter[str] = collections.Counter(dict.fromkeys(SIDES, 0))
        files = {
            side: stack.enter_context((temporary / f"{side}.jsonl").open("w", encoding="utf-8", newline="\n"))
            for side in SIDES
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
        if not all(written[side] for side in SIDES):
            raise UserError(f"{what}: {dict(written)}; both sides of the split need some, give more conversations")
        facts = {"counts": dict(written), "unusable": account.named if account else []}
        write_json(temporary / _FACTS, {**facts, **sealed(temporary, _FILES)})
    if progress:
        progress.finish()
        if account and account.bad:
            progress.note(account.line())


def open_dialogs(folder: Path) -> Dialogs:
    """What `write_dialogs` stored. Raises UserError where it is not that any more."""
    facts = read_json_object(folder / _FACTS, f"the account of conversations; delete {folder}")
    check_sealed(folder, facts, _FILES, "conversations")
    counts, unusable = facts.get("counts", {}), facts.get("unusable", [])
    known = isinstance(counts, dict) and isinstance(unusable, list) and all(isinstance(line, str) for line in unusable)
    if not known or not all(type(counts.get(side)) is int for side in SIDES):
        raise UserError(f"{folder / _FACTS} has another form than what was written. Delete the folder {folder}")
    return Dialogs(folder, facts["fingerprint"], counts, tuple(unusable))


def different(seed: int, count: int) -> Iterator[Draft]:
    """The first `count` drafts of a seed whose requests differ in more than case and whitespace."""
    seen = set()
    for index in itertools.count():
        draft = draw(seed, index)
        request = " ".join(draft.plan.request.casefold().split())
        if request in seen:
            continue
        seen.add(request)
        if len(seen) > count:
            return
        yield draft
