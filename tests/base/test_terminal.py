"""Tables, human numbers, the progress line and its estimate."""

import io
import math

import pytest

from smallcoder_jax.base import terminal
from smallcoder_jax.base.display import printable
from smallcoder_jax.base.terminal import Terminal, format_table, human_bytes, human_count, human_time, progress_line

METRICS = {
    "loss": 3.14159,
    "accuracy": 0.4321,
    "learning_rate": 3e-4,
    "grad_norm": 0.98765,
    "tokens_per_second": 18_345.6,
    "mfu": 0.412,
    "data_wait": 0.0012,
}


class FakeTty(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as a terminal would show them: a carriage return overwrites from the left."""
        lines = []
        for raw in self.getvalue().split("\n"):
            shown = ""
            for part in raw.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets: `clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (100_682_496, "100.7M"),
        (999_970, "1.0M"),
        (2.08e9, "2.1B"),
        (3e12, "3.0T"),
    ],
)
def test_human_count(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB")])
def test_human_bytes(value: float, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "12ms"),
        (4.25, "4.2s"),
        (59.97, "1m00s"),
        (61.2, "1m01s"),
        (3725, "1h02m"),
        (93780, "1d02h"),
        (math.nan, "?"),
    ],
)
def test_human_time(value: float, text: str) -> None:
    assert human_time(value) == text


def test_table_aligns_numbers_right_and_text_left() -> None:
    table = format_table(["name", "tokens"], [["a", "1,200"], ["longer", 7]])
    assert table.splitlines() == [
        "name    tokens",
        "------  ------",
        "a        1,200",
        "longer       7",
    ]


def test_table_refuses_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        format_table(["a", "b"], [["x"]])


@pytest.mark.parametrize("width", [0, 5, 12, 20, 40, 60, 79, 100, 200])
def test_progress_line_fits_the_width(width: int) -> None:
    line = progress_line(1234, 100_000, METRICS, 5000.0, width=width)
    assert len(line) <= width
    if width >= 40:
        assert "loss 3.1416" in line
        assert "ETA 1h23m" in line


def test_progress_line_shows_every_field_where_there_is_room() -> None:
    line = progress_line(12, 100, METRICS, 65.0, width=200)
    expected = "12/100  loss 3.1416  acc 43.2%  lr 3.00e-04  grad 0.988  18.3K tok/s  MFU 41.2%  wait 1ms  ETA 1m05s"
    assert line.strip() == expected


def test_progress_line_leaves_out_what_is_not_known() -> None:
    line = progress_line(1, 10, {"loss": math.nan, "mfu": None}, math.nan)
    assert line == " 1/10  loss nan  ETA ?"


def test_eta_comes_from_the_last_100_steps(clock: list[float]) -> None:
    shown = Terminal(io.StringIO(), total_steps=1000, log_every=1)
    shown.progress(0, {})
    for step in range(1, 301):
        clock[0] += 10.0 if step <= 200 else 0.5  # slow at first: that must be forgotten
        shown.progress(step, {})
    assert shown.eta() == pytest.approx(0.5 * 700)


def test_eta_counts_from_where_a_run_continues(clock: list[float]) -> None:
    shown = Terminal(io.StringIO(), total_steps=1000, log_every=10)
    shown.progress(500, {})
    assert math.isnan(shown.eta())
    clock[0] = 20.0
    shown.progress(510, {})
    assert shown.eta() == pytest.approx(2.0 * 490)


def test_tty_keeps_one_line_and_notes_do_not_overlap_it() -> None:
    stream = FakeTty()
    shown = Terminal(stream, total_steps=10, log_every=1)
    for step in range(1, 4):
        shown.progress(step, METRICS | {"loss": 10.0**-step})
    assert len(stream.screen()) == 1
    assert stream.screen()[0].startswith(" 3/10  loss 0.0010")
    shown.progress(10, {"loss": 1.0})
    assert stream.screen() == ["10/10  loss 1.0000"]  # nothing is left of the longer line
    shown.note("evaluated")
    shown.progress(4, {"loss": 1.0})
    assert stream.screen() == ["evaluated", " 4/10  loss 1.0000  " + stream.screen()[1].split("  ")[-1]]


def test_tty_line_is_as_wide_as_the_terminal_at_most() -> None:
    stream = FakeTty()
    Terminal(stream, total_steps=10, log_every=1).progress(1, METRICS)
    assert 40 < len(stream.getvalue().lstrip("\r")) <= 79  # a stream without a terminal counts as 80 columns


def test_plain_output_has_one_line_per_log_every() -> None:
    stream = io.StringIO()
    shown = Terminal(stream, total_steps=25, log_every=10)
    for step in range(1, 26):
        shown.progress(step, {"loss": 1.0})
    assert [line.split("/")[0].strip() for line in stream.getvalue().splitlines()] == ["1", "10", "20", "25"]
    assert "\r" not in stream.getvalue()


def test_a_sample_is_shown_as_the_model_wrote_it_and_cannot_steer_the_terminal() -> None:
    stream = FakeTty()
    shown = Terminal(stream, total_steps=10, log_every=1)
    shown.progress(1, {"loss": 1.0})
    shown.sample("def f(x):\n", "    return x\x1b[2Jé\r\n\tfoo\x9b")
    assert stream.screen()[-4:] == ["    | def f(x):", "    |     return x\\x1b[2Jé\\r", "    | \tfoo\\x9b", ""]
    stream = io.StringIO()
    Terminal(stream, total_steps=10, log_every=1).sample("", "x" * 500 + "\n" + "line\n" * 50)
    lines = stream.getvalue().splitlines()
    assert len(lines) == terminal.SAMPLE_LINES + 1
    assert lines[0] == "    | " + "x" * terminal.SAMPLE_WIDTH
    assert lines[-1] == "    | ..."


def test_start_and_end_tables() -> None:
    stream = io.StringIO()
    shown = Terminal(stream, total_steps=1, log_every=1)
    shown.start_table("nano", {"model": {"parameters": 4_200_000, "context": 1024}, "mesh": {"data": 8}})
    start = stream.getvalue().splitlines()
    assert start[2:5] == ["model  parameters  4200000", "       context     1024", "mesh   data        8"]
    shown.end_summary("Done.", {"loss": "2.0"}, {"report": "runs/a/report.html"}, ["python -m tools.generate"])
    end = stream.getvalue()
    assert "  report  runs/a/report.html\n" in end
    assert end.endswith("Next:\n  python -m tools.generate\n")


ESCAPES = "\x1b[2J\u202e\r\udcff"
SHOWN = "\\x1b[2J\\u202e\\r\\udcff"


def test_nothing_that_is_shown_can_steer_the_terminal() -> None:
    stream = io.StringIO()
    shown = Terminal(stream, total_steps=1, log_every=1)
    shown.note(f"note {ESCAPES}")
    shown.sample(f"sample {ESCAPES}", ESCAPES)
    shown.start_table(f"title {ESCAPES}", {f"section {ESCAPES}": {f"name {ESCAPES}": f"value {ESCAPES}\n"}})
    shown.end_summary(f"end {ESCAPES}", {f"r {ESCAPES}": ESCAPES}, {f"p {ESCAPES}": ESCAPES}, [f"next {ESCAPES}"])
    text = stream.getvalue() + format_table([f"head {ESCAPES}"], [[f"cell\n {ESCAPES}"]])
    assert text == printable(text)
    for name in ("note", "sample", "title", "section", "name", "value", "end", "r", "p", "next", "head", r"cell\n"):
        assert f"{name} {SHOWN}" in text, name


def test_a_table_that_is_too_wide_becomes_blocks() -> None:
    headers, rows = ["config", "parameters", "data"], [["a.py", "1,200", "x " * 30], ["b.py", 7, "/p" * 60]]
    assert format_table(headers, rows, width=200) == format_table(headers, rows)
    blocks = format_table(headers, rows, width=60).split("\n\n")
    assert len(blocks) == 2
    assert blocks[0].splitlines()[:3] == ["config      a.py", "parameters  1,200", "data        " + "x " * 23 + "x"]
    assert max(map(len, blocks[0].splitlines())) <= 60
    assert blocks[1].splitlines()[2:] == ["data        " + "/p" * 60]  # a path stays whole


def test_the_start_table_goes_on_below_itself_where_the_terminal_ends() -> None:
    stream = FakeTty()
    shown = Terminal(stream, total_steps=1, log_every=1)
    shown.start_table("nano", {"model": {"attention": "xla (" + "because " * 20 + ")"}})
    lines = stream.screen()
    assert max(map(len, lines)) <= 80
    assert lines[2].startswith("model  attention  xla (because")
    assert lines[3].startswith(" " * 18 + "because")
