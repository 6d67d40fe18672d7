"""Questions and answers from rows: what a row gives, what is passed over, which side it is on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.conversations.given import prepare_dialogs
from smallcoder_jax.data.conversations.given_rows import conversation_of
from smallcoder_jax.data.conversations.record import side_of
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall
from smallcoder_jax.tokenizers.chat_wire import to_wire


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return f"jsonl:{path}"


def alpaca(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"Say {number}.", "input": "", "output": f"{number}", "text": "all of it", **changes}


ROWS = [alpaca(number) for number in range(200)]


def test_a_row_is_a_question_with_its_input_and_an_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*ROWS, alpaca(7, input="  twice:\n", output="    7\n    7\n")])
    dialogs = prepare_dialogs(tmp_path / "data", source, 0)
    records = {side: dialogs.read(side) for side in ("train", "validation")}
    assert dialogs.counts == {side: len(records[side]) for side in records}
    assert sum(dialogs.counts.values()) == 201
    assert 0 < dialogs.counts["validation"] < 50
    found = {record.conversation.messages for side in records for record in records[side]}
    assert (Message("user", "Say 3."), Message("assistant", "3")) in found
    assert (Message("user", "Say 7.\n\n  twice:\n"), Message("assistant", "    7\n    7\n")) in found
    for side in records:
        for record in records[side]:
            assert record.side == side == side_of(record.conversation.messages[0].content)
            assert record.provenance["source"] == source
    last = next(r for side in records for r in records[side] if r.conversation.messages[1].content == "    7\n    7\n")
    assert last.provenance["row"] == "rows.jsonl:201"
    assert prepare_dialogs(tmp_path / "data", source, 0) == dialogs


def test_what_is_unusable_is_counted(tmp_path: Path) -> None:
    empty = [alpaca(300, output="  "), alpaca(301, instruction=None), alpaca(302, output="\ud800")]
    unusable = ["not json", [1], alpaca(1), {"instruction": "c"}, "[" * 100_000, *empty]
    said, source = io.StringIO(), write(tmp_path / "rows.jsonl", [*ROWS, *unusable])
    dialogs = prepare_dialogs(tmp_path / "data", source, 0, Progress(said))
    assert dialogs.counts["unusable"] == len(unusable)
    assert dialogs.counts["train"] + dialogs.counts["validation"] == 200
    assert dialogs.unusable == (
        "rows.jsonl:201 (no JSON: Expecting value: line 1 column 1 (char 0))",
        "rows.jsonl:202 (a JSON list and no object)",
        "rows.jsonl:203 (the same as an earlier row)",
    )
    line = f"dialogs.source={source}: 8 of 208 rows cannot be used: {'; '.join(dialogs.unusable)} and 5 more\n"
    assert line in said.getvalue()


def test_a_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [alpaca(0, output=""), *ROWS])
    dialogs = prepare_dialogs(tmp_path / "data", source, 60)
    found = [r.conversation.messages[1].content for side in ("train", "validation") for r in dialogs.read(side)]
    assert sorted(found, key=int) == [str(number) for number in range(60)]
    assert prepare_dialogs(tmp_path / "data", source, 61).fingerprint != dialogs.fingerprint


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


BASIC = conversation(("user", "Why?"), ("assistant", "So.\n"))
LONGER = conversation(
    ("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?"), ("assistant", "So.\n")
)
NAN = float("nan")
HISTORY, SYSTEM = [["Who?", "Me."]], "Be brief."
OPENAI = [{"role": message.role, "content": message.content} for message in LONGER.messages]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = [{"from": NAMES[message.role], "value": message.content} for message in LONGER.messages]
TOOL = {"name": "add", "parameters": {"type": "object"}}
CALLING = Conversation(
    (
        Message("user", "1 + 1?"),
        Message("assistant", "", (ToolCall("add", {"a": 1}),)),
        Message("tool", "2"),
        Message("assistant", "2."),
    ),
    ({"type": "function", "function": TOOL},),
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Why?", "answer": "So.\n"}, BASIC),
        ({"prompt": "Why?", "completion": "So.\n"}, BASIC),
        ({"question": "Why?", "response": "So.\n", "id": 3, "system_prompt": ""}, BASIC),
        ({"query": "Why?", "response": "So.\n", "type": "x"}, BASIC),
        ({"problem": "Why?", "solution": "So.\n"}, BASIC),
        ({"instruction": "Why?", "context": None, "response": "So.\n"}, BASIC),
        ({"input": "Why?", "output": "So.\n"}, BASIC),
        ({"instruction": "Why?", "input": "", "output": "So.\n", "system": None, "history": []}, BASIC),
        (
            {"instruction": "Why?", "input": NAN, "output": "So.\n", "history": NAN, "tools": NAN, "messages": NAN},
            BASIC,
        ),
        ({"instruction": "Why?", "output": "So.\n", "system": SYSTEM, "history": HISTORY}, LONGER),
        ({"prompt": OPENAI[:-1], "completion": OPENAI[-1:]}, LONGER),
        ({"prompt": "Why?", "completion": OPENAI[-1:]}, BASIC),
        ({"messages": OPENAI, "prompt": "Who?", "prompt_id": "x"}, LONGER),
        ({"messages": [{**turn, "tool_calls": None, "name": None, "weight": 1} for turn in OPENAI]}, LONGER),
        ({"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in OPENAI]}, LONGER),
        ({"messages": json.dumps(OPENAI), "tools": None, "images": []}, LONGER),
        ({"messages": OPENAI[1:], "system": SYSTEM}, LONGER),
        ({"messages": OPENAI, "system": SYSTEM}, LONGER),
        ({"messages": [{**OPENAI[0], "role": "developer"}, *OPENAI[1:]]}, LONGER),
        ({"id": "x_1", "conversations": SHAREGPT}, LONGER),
        ({"conversations": SHAREGPT[1:], "system": SYSTEM, "tools": ""}, LONGER),
        ({"conversations": OPENAI}, LONGER),
        ({"conversation": SHAREGPT}, LONGER),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1 + 1?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "2."},
                ],
                "tools": json.dumps([TOOL]),
            },
            CALLING,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "1 + 1?"},
                    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                    {"role": "function", "name": "add", "content": "2"},
                    {"role": "assistant", "content": "2."},
                ],
                "tools": [{"type": "function", "function": TOOL}],
            },
            CALLING,
        ),
        (to_wire(CALLING), CALLING),
    ],
)
def test_the_forms_of_data_sets(row: dict[str, Any], expected: Conversation) -> None:
    assert conversation_of(row) == (expected, 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "c"}, "no answer"),
        ({"instruction": "", "output": "x"}, "no question"),
        ({"instruction": "c", "output": " \n"}, "no answer"),
        ({"text": "x"}, "no column of a talk"),
        ({"instruction": "c", "output": "\ud800"}, "not valid Unicode"),
        ({"instruction": "c", "output": "x", "images": ["a.png"]}, "the column images cannot be used"),
        ({"instruction": "c", "output": "x", "history": [["a"]]}, "history holds"),
        ({"instruction": "c", "output": "x", "history": 3}, "history is 3"),
        ({"messages": OPENAI, "functions": [TOOL]}, "the column functions cannot be used"),
        ({"messages": OPENAI, "system": "Be long."}, "another text in the column system"),
        ({"messages": OPENAI[2:]}, "begins with a turn of the assistant"),
        ({"messages": OPENAI[:2]}, "no turn of the assistant"),
        ({"messages": [*OPENAI[:2], {"role": "assistant", "content": " "}]}, "an empty answer"),
        ({"messages": "x"}, "Expecting value"),
        ({"messages": ["x"]}, "expected a list of objects"),
        ({"messages": [{**OPENAI[0], "weight": 0}, *OPENAI[1:]]}, r"messages\[0\] has the key 'weight'"),
        ({"messages": [*OPENAI[:-1], {**OPENAI[-1], "thinking": "Hm."}]}, r"messages\[4\] has the key 'thinking'"),
        ({"messages": [*OPENAI[:-1], {"role": "judge", "content": "x"}]}, "role is 'judge'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *OPENAI[2:]]}, r"content\[0\] is"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "no response here"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add(1)"}]},
            "Expecting",
        ),
        ({"instruction": "c", "output": "x", "tools": "{}"}, "tools is a dict"),
        ({"instruction": "c", "output": "x", "tools": "[" * 99 + "]" * 99}, "brackets nested deeper than 50"),
    ],
)
def test_what_is_not_used_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises((UserError, ValueError), match=reason):
        conversation_of(row)


def test_calls_in_other_forms_are_used_and_counted(tmp_path: Path) -> None:
    call = {"name": "add", "parameters": {"a": 1}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"1 + {number}?"},
                {"role": "assistant", "tool_calls": [{"function": call}, {"name": "now"}]},
            ]
        }
        for number in range(100)
    ]
    dialogs = prepare_dialogs(tmp_path / "data", write(tmp_path / "rows.jsonl", rows), 0)
    assert dialogs.counts["calls without arguments"] == 200
    assert dialogs.read("train")[0].conversation.messages[1].tool_calls == (
        ToolCall("add", {"a": 1}),
        ToolCall("now", {}),
    )


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_the_fields_of_other_rows_are_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In a table all calls have the arguments of all functions, null where a call has none."""
    import datasets

    def row(number: int) -> dict[str, Any]:
        name, arguments = ("add", {"a": number}) if number % 2 else ("find", {"text": str(number)})
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        return {
            "messages": [{"role": "user", "content": f"{name} {number}"}, call],
            "tools": [{"name": name, "parameters": schema}],
        }

    table = datasets.Dataset.from_list([row(number) for number in range(100)])
    assert table[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "text": None}
    table.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    dialogs = prepare_dialogs(tmp_path / "data", {"hf": "hf:own/rows", "parquet": f"parquet:{tmp_path}"}[kind], 0)
    assert "unusable" not in dialogs.counts
    for record in dialogs.read("train"):
        (tool,), call = record.conversation.tools, record.conversation.messages[1].tool_calls[0]
        assert list(call.arguments) == list(tool["function"]["parameters"]["properties"])


def test_a_folder_gives_its_training_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [alpaca(300)])
    said = io.StringIO()
    dialogs = prepare_dialogs(tmp_path / "data", f"jsonl:{tmp_path}", 0, Progress(said))
    assert dialogs.counts["train"] + dialogs.counts["validation"] == 200
    assert (
        f"jsonl:{tmp_path}: reads train.jsonl and, by their names, not test.jsonl; ?split=all takes all\n"
        in said.getvalue()
    )
    everything = prepare_dialogs(tmp_path / "data", f"jsonl:{tmp_path}?split=all", 0)
    assert everything.counts["train"] + everything.counts["validation"] == 201


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
        ("jsonl:{root}/other.jsonl", "The columns found are text; expected one of messages, .* instruction, question"),
        ("jsonl:{root}/one.jsonl?column=text", "leave out column"),
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
