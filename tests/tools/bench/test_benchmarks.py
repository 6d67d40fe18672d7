"""The page of the benchmarks is what the measured figures give, and what is no figure is refused by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from tools.bench import benchmarks
from tools.bench.benchmarks import Figure

XEON, EPYC = "2 cores of an Intel Xeon (AVX-512, AMX), 24 GiB", "2 cores of an AMD EPYC (AVX-512), 24 GiB"


def line(**changes: Any) -> dict[str, Any]:
    fields = dict.fromkeys(benchmarks.FIELDS) | {"figure": "tokens", "value": 1, "date": "2026-11-20", "machine": XEON}
    return fields | changes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one subject, in the place of the project's."""
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmarks, "PAGE", tmp_path / "page.md")
    (tmp_path / "template.txt").write_text("# Page\n\n<!-- machines -->\n\n<!-- speed -->\n\n<!-- not measured -->\n")
    (tmp_path / "speed.jsonl").write_text("")
    return tmp_path


def page_of(folder: Path, *lines: dict[str, Any]) -> str:
    (folder / "speed.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    benchmarks.main([])
    return (folder / "page.md").read_text()


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| .*$", page, re.MULTILINE)][
        1:
    ]


def test_the_committed_page_is_what_the_files_give() -> None:
    benchmarks.main(["--check"])
    assert max(map(len, benchmarks.PAGE.read_text().splitlines())) <= 110


def test_another_page_is_exit_code_3(folder: Path) -> None:
    page = page_of(folder, line())
    benchmarks.main(["--check"])
    (folder / "page.md").write_text(page + "by hand\n")
    with pytest.raises(CheckFailed, match=r"python -m tools\.bench\.benchmarks writes it"):
        benchmarks.main(["--check"])
    assert (folder / "page.md").read_text().endswith("by hand\n")


def test_the_newest_value_of_each_figure_and_machine_wins(folder: Path) -> None:
    page = page_of(
        folder,
        line(value=5, date="2026-11-22", limit="≥ 4", holds=True),
        line(value=6, date="2026-11-22", limit="≥ 7", holds=False),  # of one day, the later line
        line(value=7, date="2026-11-21"),
        line(value=8, date="2026-11-21", machine=EPYC),
        line(figure="older", value=1234567.8),
    )
    assert rows(page) == [
        ["tokens", "6", "≥ 7", "NO", "Xeon", "1"],
        ["tokens", "8", "", "", "EPYC", "2"],
        ["older", "1,234,568", "", "", "Xeon", "3"],
    ]


def test_what_nobody_has_measured_is_listed_until_somebody_has(folder: Path) -> None:
    missing = line(value=None, date=None, machine=None, limit="≥ 3", command="measure --it")
    assert page_of(folder, missing).endswith("Nothing has been measured.\n\n- tokens (≥ 3): `measure --it`\n")
    assert "measure" not in page_of(folder, missing, line())


def test_a_run_says_what_its_figures_have_in_common_and_a_note_whose_it_is(folder: Path) -> None:
    run = {"commit": "abc", "versions": "jax 1", "load": 0.5, "command": "measure"}
    others = [line(figure=name, **run, note="warm; idle") for name in ("memory", "loss")]
    page = page_of(folder, line(**run, note="alone; warm"), *others)
    described = "commit abc, load 0.5, jax 1: `measure`; warm; *tokens*: alone; *all but tokens*: idle."
    assert f"\n1. 2026-11-20, {described}\n" in page
    assert "- **Xeon**: 2 cores of an Intel Xeon" in page


def test_lines_stay_within_110_characters(folder: Path) -> None:
    long = "a word " * 60
    widest = line(figure="f" * 50, value="v" * 16, limit="l" * 12, holds=False, command=long, note=long, versions=long)
    others = [
        line(figure=f"{number}", command=f"{number}", machine=f"a Threadripper, {number}") for number in range(98)
    ]
    page = page_of(folder, *others, widest, line(figure="x", value=None, date=None, command=long))
    assert max(map(len, page.splitlines())) <= 110
    (folder / "template.txt").write_text("w " * 56)
    with pytest.raises(UserError, match=r"template\.txt, line 1: 112 characters; expected at most 110"):
        benchmarks.main([])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object with the keys figure, value"),
        ('{"figure": "x", "figure": "y"}', "the key 'figure' occurs twice"),
        (json.dumps({"figure": "x"}), "expected a JSON object with the keys"),
        (json.dumps(line(more=1)), "and no others"),
        (json.dumps(line(value=True)), "value is true; expected a number"),
        (json.dumps(line(value=float("nan"))), "NaN is no JSON number"),
        (json.dumps(line(value="v" * 17)), "17 characters; expected at most 16"),
        (json.dumps(line(figure="f" * 51)), "at most 50 characters"),
        (json.dumps(line(figure="two\nlines")), "figure is"),
        (json.dumps(line(limit="l" * 13)), "at most 12 characters"),
        (json.dumps(line(holds="yes")), "expected true, false or null"),
        (json.dumps(line(date="30.11.2026")), "date is"),
        (json.dumps(line(date=None)), "has a value and a date"),
        (json.dumps(line(value=None)), "has a value and a date"),
        (json.dumps(line(load="busy")), "beside other work"),
        ("", "expected a JSON object"),
    ],
)
def test_malformed_lines_are_refused_by_file_and_line(folder: Path, text: str, words: str) -> None:
    (folder / "speed.jsonl").write_text(f"{json.dumps(line())}\n{text}\n")
    with pytest.raises(UserError, match=r"speed\.jsonl, line 2: ") as caught:
        benchmarks.main([])
    assert words in str(caught.value)


def test_a_file_without_a_place_and_a_place_without_a_file_are_refused(folder: Path) -> None:
    (folder / "more.jsonl").write_text("")
    with pytest.raises(UserError, match="no place for more"):
        benchmarks.main([])
    (folder / "template.txt").write_text("<!-- none -->\n")
    with pytest.raises(UserError, match=r"template\.txt, line 1: none is no file of"):
        benchmarks.main([])


def test_figures_are_recorded_with_when_where_and_how(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "LOAD_AT_START", 0.123)
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "tools.speed", "--record", "--name=a b"])
    (folder / "speed.jsonl").write_text(json.dumps(line()))  # without a line end
    benchmarks.record("speed", [Figure("tokens", 2.5, "tokens/s", "≥ 2", True, "a note"), Figure("memory", 3)])
    _, first, second = benchmarks.read(folder / "speed.jsonl")
    assert list(first) == list(benchmarks.FIELDS)
    assert (first["value"], first["unit"], first["limit"], first["holds"], first["note"]) == (
        2.5,
        "tokens/s",
        "≥ 2",
        True,
        "a note",
    )
    assert (first["load"], first["command"]) == (0.12, "python -m tools.speed --record '--name=a b'")
    assert re.fullmatch(r"Python 3\.\S+, jax \S+, flax \S+", first["versions"])
    assert first["machine"] == benchmarks.machine()
    assert (second["value"], second["limit"], second["date"]) == (3, None, first["date"])
    benchmarks.main([])
    with pytest.raises(UserError, match="--record needs a checkout"):
        benchmarks.record("none", [])
    before = (folder / "speed.jsonl").read_bytes()
    with pytest.raises(UserError, match="tokens, as it was measured"):
        benchmarks.record("speed", [Figure("memory", 3), Figure("tokens", float("nan"))])
    assert (folder / "speed.jsonl").read_bytes() == before


@pytest.mark.parametrize(("status", "commit"), [("", "0123abc"), (" M tools/x.py", "0123abc+changes")])
def test_changes_are_part_of_the_commit(status: str, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "0123abc", "status": status}
    monkeypatch.setattr(benchmarks, "_output", lambda *command: answers[command[1]])
    assert benchmarks.commit() == commit


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*command: str) -> str:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(benchmarks, "_output", missing)
    assert benchmarks.commit() is None


@pytest.mark.parametrize(
    ("model", "flags", "found"),
    [
        ("Intel(R) Xeon(R) Gold 6 CPU @ 2.70GHz", "avx512f amx_tile", ("Intel Xeon Gold", ["AVX-512", "AMX"])),
        ("Intel(R) Xeon(R) Processor", "avx512f amx_tile", ("Intel Xeon", ["AVX-512", "AMX"])),
        ("AMD EPYC 7B13 64-Core Processor", "avx2", ("AMD EPYC", [])),
    ],
)  # fmt: skip
def test_the_family_of_a_cpu(model: str, flags: str, found: tuple[str, list[str]], tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: {model}\ncache size\t: 1 KB\nflags\t\t: fpu {flags}\n\n")
    assert benchmarks.cpu(info) == found


def test_a_gpu_is_named_with_its_power_and_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(benchmarks, "_output", lambda *command: "NVIDIA H200, 580.65.06, 700.00 W")
    monkeypatch.setattr(benchmarks, "cores", lambda: 16)
    monkeypatch.setattr(benchmarks, "_gpus", benchmarks._gpus.__wrapped__)  # not what was found before
    assert benchmarks.machine() == "one NVIDIA H200 (700 W), 16 cores"
    assert benchmarks.versions().endswith(", driver 580.65.06")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "GiB" in benchmarks.machine()
