"""Generated conversations on disk: made once, different, refused when changed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.conversations.generate import draw
from smallcoder_jax.data.conversations.store import Dialogs, open_dialogs
from smallcoder_jax.data.conversations.tools import different, prepare_tool_dialogs


def answer(name: str, arguments: dict[str, Any]) -> str:
    return f"{name} of {len(arguments)}\u2028\r\n"  # separators of lines that JSON leaves as they are


@pytest.fixture
def dialogs(tmp_path: Path) -> Dialogs:
    return prepare_tool_dialogs(tmp_path, 60, 3, answer)


def test_both_sides_hold_what_the_indices_draw(dialogs: Dialogs) -> None:
    train, validation = dialogs.read("train"), dialogs.read("validation")
    assert (len(train), len(validation)) == (dialogs.counts["train"], dialogs.counts["validation"])
    assert len(train) + len(validation) == 60
    assert len(validation) > 0
    assert {record.side for record in validation} == {"validation"}
    first = next(different(3, 60))
    assert first.plan.request in [message.content for message in (train + validation)[0].conversation.messages]


def test_requests_differ() -> None:
    requests = [" ".join(draft.plan.request.casefold().split()) for draft in different(0, 1500)]
    assert len(requests) == len(set(requests)) == 1500
    drawn = [" ".join(draw(0, index).plan.request.casefold().split()) for index in range(1500)]
    assert len(set(drawn)) < 1500  # or else this test would show nothing


def test_they_are_made_once(dialogs: Dialogs, tmp_path: Path) -> None:
    def refuse(name: str, arguments: dict[str, Any]) -> str:
        raise AssertionError("made again")

    assert prepare_tool_dialogs(tmp_path, 60, 3, refuse) == dialogs
    with pytest.raises(AssertionError, match="made again"):
        prepare_tool_dialogs(tmp_path, 60, 4, refuse)
    assert len(list((tmp_path / "dialogs").iterdir())) == 1  # nothing half-made stays


def test_changed_files_are_refused(dialogs: Dialogs, tmp_path: Path) -> None:
    path = dialogs.folder / "train.jsonl"
    path.write_text(path.read_text().replace("execute", "exequte"))
    with pytest.raises(UserError, match=r"train.jsonl is damaged or was changed since they were made"):
        prepare_tool_dialogs(tmp_path, 60, 3, answer)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(dialogs: Dialogs, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(dialogs.folder, folder)
    (folder / "train.jsonl").unlink()
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        open_dialogs(folder)
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        dataclasses.replace(dialogs, folder=folder).read("train")
