"""Files of rows: whatever form they come in gives the same rows; what is none is bounded, counted and named."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig
from smallcoder_jax.data.corpus.collect import collect_source
from smallcoder_jax.data.sources import row_files
from smallcoder_jax.data.sources.cells import Account, Row, text_of
from smallcoder_jax.data.sources.document import Document, Skipped
from smallcoder_jax.data.sources.row_files import find_files
from smallcoder_jax.data.sources.spec import parse_sources, read_source

ROWS = [{"content": f"x = {number}  # é, [{{", "n": number} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
OVER_LINES = "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS).encode()  # as jq writes them
BOM = b"\xef\xbb\xbf"


def read(location: Path, kind: str = "jsonl", split: str | None = None, wanted: tuple[str, ...] = ()) -> list[Row]:
    return list(find_files("s", kind, str(location), split).rows(wanted))


def columns(rows: list[Row]) -> list[Any]:
    return [row.columns for row in rows]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize(
    "text",
    [LINES, BOM + LINES, LINES.replace(b"\n", b"\r\n\r\n"), ARRAY, BOM + b"\n" + ARRAY, OVER_LINES, BOM + OVER_LINES],
)
@pytest.mark.parametrize(
    "packed", [bytes, gzip.compress, zstd, lambda text: gzip.compress(text[:9]) + gzip.compress(text[9:])]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.txt"])
def test_the_same_rows_in_every_form(tmp_path: Path, name: str, packed: Callable[[bytes], bytes], text: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(packed(text))
    assert columns(read(path)) == ROWS


def test_a_place_is_a_line_of_lines_and_an_item_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n\n  \n{"a": 2}')
    assert [row.place for row in read(path)] == ["rows.jsonl:2", "rows.jsonl:5"]
    path.write_bytes(b'[\n{"a": 1},\n\n{"a": 2}]')
    assert [row.place for row in read(path)] == ["rows.jsonl:1", "rows.jsonl:2"]


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_ITEMS = {
    b"{broken": "no JSON: Expecting property name",
    b"7": "a JSON int and no object",
    b'"text"': "a JSON str and no object",
    DEEP: "no JSON: brackets nested too deep",
    b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}": "no JSON: brackets nested deeper than 100",
    b'{"a": "\xff"}': "not UTF-8: invalid start byte at byte 7",
    b'{"a": ' + b"9" * 5000 + b"}": "no JSON: Exceeds the limit",
    b'{"a": "' + b"x" * 2000 + b'"}': "longer than 1,000 bytes",
}


@pytest.mark.parametrize("number", range(len(BAD_ITEMS)))
@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_bad_row_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, form: str) -> None:
    bad, problem = list(BAD_ITEMS.items())[number]
    if bad == b"{broken" and form == "array":
        bad = b'{broken [,] "a,b\\"c]" }'
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000 if "longer" in problem else 1 << 20)
    path, items = tmp_path / "rows.json", [b'{"n": 1}', bad, b'{"n": 2}']
    path.write_bytes(b"[" + b", ".join(items) + b"]" if form == "array" else b"\n".join(items))
    first, found, last = read(path)
    assert (first.columns, last.columns) == ({"n": 1}, {"n": 2})
    assert found.columns == {}
    assert found.place == "rows.json:2"
    assert found.problem.startswith(problem)


@pytest.mark.parametrize(
    ("text", "count", "problem"),
    [
        (b'[{"n": 1}, {"n": 2', 1, "no JSON"),
        (b'[{"n": 1}, {"n": "2', 1, "no JSON"),
        (b'[{"n": 1}]\n{"n": 2}\n', 1, ""),
        (b'[{"n": 1}] rest', 1, "no JSON"),
        (b'[{"n": 1},]', 1, None),
        (b"[]", 0, None),
        (b'{\n"n": 1}\n{"n": 2', 1, "no JSON"),
        (b'{\n"n": 1}}\n', 1, "no JSON"),
        (b"{\n}\n", 0, ""),
        (b'{\n"n": 1}\nrest', 1, "no JSON"),
        (b'{\n"n": 1}\n,{"n": 2}', 1, "no JSON"),
    ],
)
def test_arrays_that_are_cut_off_or_go_on(tmp_path: Path, text: bytes, count: int, problem: str | None) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    rows = read(path)
    assert columns(rows[:count]) == [{"n": 1}] * count
    assert len(rows) == count + (problem is not None)
    assert not problem or rows[-1].problem.startswith(problem)


def test_an_array_has_a_size_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ARRAY_BYTES", 100)
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(ARRAY))
    with pytest.raises(UserError, match=r"one JSON array, or .* of more than 100 bytes; write one object a line: jq"):
        read(path)


@pytest.mark.parametrize("packed", ["plain", "gzip", "zstd"])
def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, packed: str) -> None:
    """A line of 400 MB between two rows, read with room for 200 MB more than the imports take."""
    path, size = tmp_path / "rows.jsonl", 400 << 20
    zeros = b"0" * (1 << 20)
    before, after = b'{"n": 1}\n{"a": "', b'"}\n{"n": 2}\n'
    if packed == "plain":
        with path.open("wb") as file:  # sparse: zero bytes that take no room on the disk
            file.write(before)
            file.seek(size)
            file.write(after)
    elif packed == "gzip":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for part in (before, *[zeros] * (size >> 20), after):
                file.write(part)
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            for part in (before, *[zeros] * (size >> 20), after):
                stream.write(part)
    program = f"""
import resource, pyarrow
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.data.sources.row_files import find_files
files = find_files("s", "jsonl", {str(path)!r}, None)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
print([(row.columns, row.problem) for row in files.rows(())])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == str([({"n": 1}, ""), ({}, "longer than 16,777,216 bytes"), ({"n": 2}, "")]) + "\n", done


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bz2.compress(LINES), "rows.jsonl is compressed by bzip2; decompress it with bunzip2"),
        (lzma.compress(LINES), "compressed by xz"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"PAR1....PAR1", r"is Parquet; name it with parquet:PATH"),
        (LINES.decode().encode("utf-16"), "UTF-16; convert it with iconv"),
        # Without the time, which differs between the processes that run the tests.
        (gzip.compress(LINES, mtime=0)[:-20], "cannot be read: .*ended before the end"),
        (gzip.compress(bytes(range(256)) * 20, mtime=0)[:60] + b"garbage" * 50, "cannot be read: "),
        (zstd(LINES * 99)[:-20], "cannot be read: Truncated"),
    ],
    ids=["bzip2", "xz", "zip", "parquet", "utf-16", "gzip cut off", "gzip spoilt", "zstd cut off"],
)
def test_what_cannot_be_read_is_named_as_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows.jsonl")


def test_zstd_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"is compressed by zstd, which needs pyarrow.*\[hub\].*unzstd"):
        read(tmp_path / "rows.jsonl.zst")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("within", [False, True])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, within: bool) -> None:
    pipe, device = tmp_path / f"a.{kind}", tmp_path / "other" / f"b.{kind}"
    os.mkfifo(pipe)
    device.parent.mkdir()
    device.symlink_to("/dev/zero")
    for path, what in ((pipe, "a pipe"), (device, "a device")):
        with pytest.raises(UserError, match=f"{path}.*it is {what}, not a file"):
            read(path.parent if within else path, kind)


SPLITS = {
    "train": ["train.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl.gz", "more.json"],
    "test": ["test.jsonl", "my_test.jsonl"],
    "validation": ["validation-0.jsonl", "valid.jsonl", "dev.json", "eval_1.jsonl"],
}


def folder_of(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    return root


def test_a_folder_is_read_by_the_splits_that_its_names_tell(tmp_path: Path) -> None:
    every = sorted(name for names in SPLITS.values() for name in names)
    root = folder_of(tmp_path, [*every, ".hidden.jsonl", "README.md"])
    files = find_files("s", "jsonl", str(root), None)
    assert sorted(files.paths) == sorted(SPLITS["train"])
    assert sorted(files.left_out) == sorted(SPLITS["test"] + SPLITS["validation"])
    assert files.note.startswith("s: reads more.json, train-00000-of-00002.jsonl")
    assert files.note.endswith("?split=all takes all")
    for split, names in SPLITS.items():
        assert sorted(find_files("s", "jsonl", str(root), split).paths) == sorted(names)
    assert sorted(find_files("s", "jsonl", str(root), "all").paths) == every
    assert not find_files("s", "jsonl", str(root), "all").note
    with pytest.raises(UserError, match=r"is of split=tset; expected one of all, test, train, validation"):
        find_files("s", "jsonl", str(root), "tset")
    with pytest.raises(UserError, match="split=test chooses among the files of a folder"):
        find_files("s", "jsonl", str(root / "test.jsonl"), "test")


def test_names_without_a_split_and_the_subfolder_data(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "one", ["latest.jsonl", "trained.jsonl", "data/contest.jsonl"])
    assert list(find_files("s", "jsonl", str(root), None).paths) == [
        "latest.jsonl",
        "trained.jsonl",
        "data/contest.jsonl",
    ]
    only_test = folder_of(tmp_path / "two", ["data/test.jsonl", "other/rows.jsonl"])
    assert [row.place for row in read(only_test)][:1] == ["data/test.jsonl:1"]
    with pytest.raises(UserError, match=r"holds no \.parquet file"):
        find_files("s", "parquet", str(root), None)


def test_documents_leave_other_splits_out_and_count_them(tmp_path: Path) -> None:
    root = folder_of(tmp_path, ["train.jsonl", "test.jsonl"])
    items = list(read_source(parse_sources(f"jsonl:{root}")[0], Path("/nowhere")))
    assert items[0] == Skipped("other_split", "test.jsonl")
    assert len(items) == 6
    assert len(list(read_source(parse_sources(f"jsonl:{root}?split=all")[0], Path("/nowhere")))) == 10


def test_bad_rows_are_counted_and_the_first_three_said_in_one_line(tmp_path: Path) -> None:
    root, said = folder_of(tmp_path / "rows", ["test.jsonl"]), io.StringIO()
    good = [json.dumps({"content": f"x = {number}"}) for number in range(5)]
    (root / "train.jsonl").write_text("\n".join(["{", *good, "[]", '{"a": 1}', "\x1b"]))
    (spec,) = parse_sources(f"jsonl:{root}")
    data = DataConfig(sources=spec.text, dir=str(tmp_path), min_characters=1)
    report = collect_source(spec, data, tmp_path / "spool", set(), Progress(said))
    assert (report.read, report.kept, report.unreadable, report.passed_over) == (9, 5, 4, {"other_split": 1})
    bad, split = said.getvalue().splitlines()[-2:]
    assert bad.startswith(f"jsonl:{root}: 4 of 9 cannot be read: train.jsonl:1 (no JSON: ")
    assert (
        "; train.jsonl:7 (a JSON list and no object); train.jsonl:8 (no column content or text or code) and more" in bad
    )
    assert split == f"jsonl:{root}: 1 files are of other splits by their names; ?split=all takes all"


def test_the_hash_is_that_of_names_sizes_and_times(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "one", ["a.jsonl", "b.jsonl"])
    other = folder_of(tmp_path / "two", ["a.jsonl", "b.jsonl"])
    for folder, name in itertools.product((root, other), ("a.jsonl", "b.jsonl")):
        os.utime(folder / name, (1, 1))
    found = find_files("s", "jsonl", str(root), None).hash()
    assert find_files("s", "jsonl", str(other), None).hash() == found
    os.utime(other / "a.jsonl", (1, 2))
    assert find_files("s", "jsonl", str(other), None).hash() != found
    (other / "a.jsonl").write_bytes(LINES[:-1])
    os.utime(other / "a.jsonl", (1, 1))
    assert find_files("s", "jsonl", str(other), None).hash() != found


def test_a_line_without_an_end_in_sight_is_no_file_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 3 << 20)
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * (5 << 20) + b"\n")
    rows = find_files("s", "jsonl", str(tmp_path / "a.jsonl"), None).rows(())
    assert next(rows).problem == ""
    with pytest.raises(UserError, match=r"line 2 of .*a\.jsonl is longer than 3,145,728 bytes"):
        next(rows)


def invalid_utf8(count: int, bad: int) -> pyarrow.Array:
    texts = [b"\xff\xfe" if number == bad else f"t{number}".encode() for number in range(count)]
    offsets = [sum(map(len, texts[:number])) for number in range(count + 1)]
    buffers = [
        None,
        pyarrow.py_buffer(b"".join(o.to_bytes(4, "little") for o in offsets)),
        pyarrow.py_buffer(b"".join(texts)),
    ]
    return pyarrow.Array.from_buffers(pyarrow.string(), count, buffers)


def test_a_cell_of_a_table_that_is_too_long_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(row_files, "_BATCH_BYTES", 1000)  # so the batches are of a row each
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", "x" * 9000, "y"]}), tmp_path / "rows.parquet")
    first, bad, last = read(tmp_path / "rows.parquet", "parquet", wanted=("a",))
    assert (first.columns, bad.problem, last.columns) == ({"a": "x"}, "a: longer than 1,000 bytes", {"a": "y"})


def test_parquet_reads_the_wanted_columns_alone_and_a_bad_cell_costs_its_row(tmp_path: Path) -> None:
    count = 200
    table = pyarrow.table(
        {
            "content": [f"x = {number}" for number in range(count)],
            "author": invalid_utf8(count, 3),
            "when": pyarrow.array([10**18 + 1] * count, pyarrow.timestamp("ns")),
            "year": pyarrow.array([2**60] * count, pyarrow.timestamp("ms")),
        }
    )
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    documents = list(read_source(parse_sources(f"parquet:{path}")[0], Path("/nowhere")))
    assert [item.text for item in documents if isinstance(item, Document)] == table["content"].to_pylist()

    items = list(read_source(parse_sources(f"parquet:{path}?column=content+author")[0], Path("/nowhere")))
    assert [item for item in items if isinstance(item, Skipped)] == [
        Skipped(
            "unreadable",
            "rows.parquet:4 (author: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        )
    ]
    assert len(items) == count
    with pytest.raises(
        UserError,
        match=r"200 of 200 rows .* rows.parquet:1 \(year: .*found are content, author, when, year; expected",
    ):
        list(read_source(parse_sources(f"parquet:{path}?column=year")[0], Path("/nowhere")))
    with pytest.raises(UserError, match="The columns found are content, author, when, year; expected column body"):
        list(read_source(parse_sources(f"parquet:{path}?column=body")[0], Path("/nowhere")))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (float("nan"), ""), ("  a\n", "  a\n"), (b"\xc3\xa9", "é"), (3, "3"), (2.5, "2.5"), (True, "true"),
        ({"a": ["é", None, b"b"]}, '{"a": ["é", null, "b"]}'), ([], "[]"),
    ],
)  # fmt: skip
def test_a_cell_as_text(value: Any, text: str) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], b"\xff", {"\udfff": 1}, [b"\xff"]])
def test_what_is_not_unicode_is_no_text(value: Any) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        text_of(value)


def test_every_row_takes_what_it_has(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "c", "output": 4},
        {"output": {"x": 1}, "other": 0},
        {"other": 1},
        {"instruction": "d", "input": "e", "output": "f"},
        {"instruction": None, "text": "g"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = list(read_source(parse_sources(f"jsonl:{path}?column=instruction+input+output")[0], Path("/nowhere")))
    found = [item.text if isinstance(item, Document) else item.path for item in items]
    bad = "rows.jsonl:4 (no column instruction or input or output)"
    assert found == ["a\n\nb", "c\n\n4", '{"x": 1}', bad, "d\n\ne\n\nf", ""]
    with pytest.raises(UserError, match=r"no row has the column ouput; expected column instruction\+ouput"):
        list(read_source(parse_sources(f"jsonl:{path}?column=instruction+ouput")[0], Path("/nowhere")))
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"content": None, "code": "x"}, {"text": "y"}]))
    items = list(read_source(parse_sources(f"jsonl:{path}")[0], Path("/nowhere")))
    assert [item.text for item in items if isinstance(item, Document)] == ["x", "y"]


def test_the_account_names_three_and_refuses_only_what_is_of_no_use() -> None:
    account = Account("source", "column a")
    for number in range(5):
        account.add_bad(Row(f"f:{number}", {"b\x1b": 1, "c": 2}), "no a")
    with pytest.raises(UserError, match=r"columns found are b\\x1b, c; expected column a"):
        account.check()
    account.add_used()
    account.check()
    assert account.line() == "source: 5 of 6 rows cannot be used: f:0 (no a); f:1 (no a); f:2 (no a) and 2 more"
