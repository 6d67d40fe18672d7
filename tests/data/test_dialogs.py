"""Questions and answers from rows: what a row gives, what is passed over, which side it is on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.conversations import side_of
from smallcoder_jax.data.dialogs import prepare_dialogs
from smallcoder_jax.tokenizers.chat import Message


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return f"jsonl:{path}"


def alpaca(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"Say {number}.", "input": "", "output": f"{number}", "text": "all of it", **changes}


ROWS = [alpaca(number) for number in range(200)]


def test_a_row_is_a_question_with_its_input_and_an_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*ROWS, alpaca(7, input=" twice \n", output=" 7 7\n")])
    dialogs = prepare_dialogs(tmp_path / "data", source, 0)
    records = {side: dialogs.read(side) for side in ("train", "validation")}
    assert dialogs.counts == {side: len(records[side]) for side in records}
    assert sum(dialogs.counts.values()) == 201
    assert 0 < dialogs.counts["validation"] < 50
    found = {record.conversation.messages for side in records for record in records[side]}
    assert (Message("user", "Say 3."), Message("assistant", "3")) in found
    assert (Message("user", "Say 7.\n\ntwice"), Message("assistant", "7 7")) in found
    for side in records:
        for record in records[side]:
            assert record.side == side == side_of(record.conversation.messages[0].content)
            assert record.provenance["source"] == source
    last = next(r for side in records for r in records[side] if r.conversation.messages[1].content == "7 7")
    assert last.provenance["row"] == "rows.jsonl:200"
    assert prepare_dialogs(tmp_path / "data", source, 0) == dialogs


def test_what_is_unusable_is_counted(tmp_path: Path) -> None:
    empty = [alpaca(300, output="  "), alpaca(301, instruction=None), alpaca(302, output="\ud800")]
    unusable = ["not json", [1], alpaca(1), *empty]
    dialogs = prepare_dialogs(tmp_path / "data", write(tmp_path / "rows.jsonl", [*ROWS, *unusable]), 0)
    assert dialogs.counts["unusable"] == len(unusable)
    assert dialogs.counts["train"] + dialogs.counts["validation"] == 200


def test_a_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [alpaca(0, output=""), *ROWS])
    dialogs = prepare_dialogs(tmp_path / "data", source, 60)
    found = [r.conversation.messages[1].content for side in ("train", "validation") for r in dialogs.read(side)]
    assert sorted(found, key=int) == [str(number) for number in range(60)]
    assert prepare_dialogs(tmp_path / "data", source, 61).fingerprint != dialogs.fingerprint


@pytest.mark.parametrize(
    "row", [{"question": "Why?", "answer": "So."}, {"prompt": "Why?", "completion": "So."}]
)  # as glaive-code-assistant has them
def test_other_names_of_the_columns(tmp_path: Path, row: dict[str, str]) -> None:
    asked, answered = row
    rows = [{asked: f"{row[asked]} {number}", answered: row[answered]} for number in range(100)]
    dialogs = prepare_dialogs(tmp_path / "data", write(tmp_path / "rows.jsonl", rows), 0)
    assert dialogs.read("train")[0].conversation.messages[1] == Message("assistant", "So.")


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    from_parquet = prepare_dialogs(tmp_path / "data", f"parquet:{tmp_path / 'rows.parquet'}", 0)
    from_lines = prepare_dialogs(tmp_path / "data", write(tmp_path / "rows.jsonl", ROWS), 0)
    for side in ("train", "validation"):
        mine, theirs = ([r.conversation for r in each.read(side)] for each in (from_parquet, from_lines))
        assert mine == theirs


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlib", "expected one of jsonl:..., parquet:..., hf:..."),
        ("jsonl:a,jsonl:b", "expected one of jsonl"),
        ("jsonl:{root}/nowhere.jsonl", "does not exist"),
        ("jsonl:{root}/other.jsonl", "has the columns text; expected one of instruction, question, prompt"),
        ("jsonl:{root}/one.jsonl", "both sides of the split need some"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path / "other.jsonl", [{"text": "only text"}])
    write(tmp_path / "one.jsonl", [alpaca(1)])
    with pytest.raises(UserError, match=message):
        prepare_dialogs(tmp_path / "data", source.format(root=tmp_path), 0)
    assert not list(tmp_path.glob("data/dialogs/*/*"))


def test_the_hub_with_and_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    dialogs = prepare_dialogs(tmp_path / "data", "hf:vicgalle/alpaca-gpt4", 50)
    assert dialogs.counts["train"] + dialogs.counts["validation"] == 50
    assert dialogs.read("train")[0].provenance["row"].startswith("vicgalle/alpaca-gpt4/train:")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"no route.*Three ways out"):
        prepare_dialogs(tmp_path / "data", "hf:vicgalle/alpaca-gpt4", 51)
