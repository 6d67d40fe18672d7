"""report.html: everything in one file, and nothing from the run is taken as HTML."""

import html.parser
import os
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.display import printable
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import write_json
from smallcoder_jax.config import (
    Config,
    EvalConfig,
    PreferencesConfig,
    RLConfig,
    StageConfig,
    TrainConfig,
    to_dict,
)
from smallcoder_jax.report import charts, run_folder
from smallcoder_jax.report.page import OLDER_SAMPLES, _samples_by_step, generate_command, tables, write_report
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.run import _results
from smallcoder_jax.train.loop import Outcome

ATTACK = "<script>alert('x')</script>&amp;"


class Page(html.parser.HTMLParser):
    """Tags, the addresses that they load, and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "nano")
    folder.write_config(Config(name="nano"))
    folder.write_run_json({"data": {"fingerprint": "ab12"}}, {})
    charts.draw_training({"steps": [1, 2], "loss": [3.0, 2.0]}, folder, 2)
    samples = [{"step": step, "input": "def f():\n", "output": ATTACK, "accuracy": None} for step in (10, 20)]
    write_json(folder.text_samples_json, [*samples, {"step": 20, "input": "x", "output": "y", "accuracy": 0.25}])
    return folder


def write_info(folder: RunFolder, *, dummy_data: bool) -> None:
    run_folder.write_training_info(
        folder,
        variant_name="SmallCoder-nano",
        parameters=4_200_000,
        dataset="stdlib",
        config=Config(),
        steps=20,
        tokens_seen=1_000_000,
        train_seconds=90.0,
        final_train_loss=2.0,
        best_val_loss=2.5,
        skipped_updates=0,
        best_step=20,
        dummy_data=dummy_data,
        started_from=None,
    )


def test_samples_and_names_are_escaped(folder: RunFolder) -> None:
    page = Page(write_report(folder, {ATTACK: {"x": ATTACK}}, {ATTACK: 1}).read_text())
    assert "script" not in page.tags
    assert page.text.count(ATTACK) == 4 + 1  # two samples, three cells or titles
    assert page.open == []


def test_nothing_on_the_page_runs_backwards_or_is_invisible(folder: RunFolder) -> None:
    odd = "\x1b[2J\u202egnp.exe\u200b\udcff"
    write_json(folder.text_samples_json, [{"step": 1, "input": odd, "output": odd, "accuracy": None}])
    folder.update_run_json(command=odd)
    values = {odd: {odd: odd, "list": [odd]}}
    page = write_report(folder, values, values).read_text()
    assert page == printable(page)
    assert page.count(r"\x1b[2J\u202egnp.exe\u200b\udcff") == 11


def test_records_of_many_columns_become_columns_themselves(folder: RunFolder) -> None:
    sources = [{**{f"dropped_{i}": i for i in range(30)}, "spec": spec, "kept": 7} for spec in ("stdlib", "dir:a")]
    (table,) = tables({"sources": sources})
    assert list(table.headers) == ["", "stdlib", "dir:a"]
    assert [[cell.text for cell in row] for row in table.rows][-2:] == [["dropped 29", "29", "29"], ["kept", "7", "7"]]
    assert len(table.rows) == 31
    (table,) = tables({"rows": [dict.fromkeys("abcdefghi", 1)] * 2})
    assert list(table.headers) == ["", "1", "2"]


def test_the_page_loads_nothing_from_elsewhere(folder: RunFolder) -> None:
    page = Page(write_report(folder, {}, {}).read_text())
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == 1
    assert "link" not in page.tags


def test_it_says_what_the_run_was(folder: RunFolder) -> None:
    write_info(folder, dummy_data=False)
    accounting = {"sources": [{"spec": "stdlib", "train": {"documents": 1632, "tokens": 7_812_345}}]}
    page = Page(write_report(folder, accounting, {"export parity": "passed"}).read_text())
    for expected in (
        "SmallCoder-nano",
        "4.2M",
        "1m30s",
        "passed",
        "7,812,345",
        "accuracy 25.0%",
        "ab12",
        "rmsnorm",
    ):
        assert expected in page.text
    assert f"python -m tools.verify_models --run {folder.path}" in page.text
    assert folder.read_run_json()["command"] in page.text
    assert "Trained on dummy data" not in page.text


def test_bits_per_byte_stand_at_the_top_and_say_what_they_are_of(folder: RunFolder) -> None:
    config = Config(train=TrainConfig(batch_size=8), eval=EvalConfig(batches=5))
    references = {"gzip -9": 1.98, "xz -9e, all in one": 1.21}

    def page(config: Config, evaluation: dict[str, float]) -> str:
        outcome = Outcome(step=20, interrupted=False, evaluation=evaluation, tokens_seen=1_000_000)
        return Page(write_report(folder, {}, _results(config, outcome, references)).read_text()).text

    shown = page(config, {"loss": 2.5, "bits_per_byte": 1.604})
    results = shown.index("Results", shown.index("Reproduce"))
    assert shown.index("1.604") < results < shown.rindex("1.604")
    assert "the first 40 rows of the held-out files, or all if fewer" in shown
    of_compressors = shown.index("bits per byte of compressors, on all held-out files")
    assert results < shown.rindex("1.604") < of_compressors < shown.index("1.98") < shown.index("1.21")
    whole = page(Config(eval=EvalConfig(batches=0)), {"loss": 2.5, "bits_per_byte": 1.604})
    assert "evaluated onall held-out files" in whole.replace("\n", "")
    assert "evaluated on" not in page(config, {})


def test_dummy_data_is_said_at_the_top(folder: RunFolder) -> None:
    write_info(folder, dummy_data=True)
    page = Page(write_report(folder, {}, {}).read_text())
    assert page.text.index("Trained on dummy data") < page.text.index("Results", page.text.index("Reproduce"))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(Config())
    page = Page(write_report(folder, {}, {}).read_text())
    assert "No chart was drawn yet." in page.text
    assert "No samples were taken yet." in page.text


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "--prompt 'def main():'"),
        ({"stage": StageConfig("distill")}, "--prompt 'def main():'"),
        ({"stage": StageConfig("sft")}, "--chat"),
        ({"stage": StageConfig("dpo")}, "--chat"),
        ({"stage": StageConfig("dpo"), "preferences": PreferencesConfig(sources="code")}, "--prompt 'def main():'"),
        ({"stage": StageConfig("ppo")}, "--chat"),
        ({"stage": StageConfig("grpo"), "rl": RLConfig(prompts="code")}, "--prompt 'def main():'"),
    ],
)
def test_the_command_that_tries_a_run_fits_what_it_learned(tmp_path: Path, changes: dict[str, Any], how: str) -> None:
    folder = RunFolder(tmp_path / "a run")
    config = to_dict(Config(**changes))
    command = f"python -m tools.generate --checkpoint '{folder.path}' {how}"
    assert generate_command(folder.path, config) == command
    folder.write_config(Config(**changes))
    write_report(folder, {}, {})
    assert command in Page(folder.report_html.read_text()).text


def test_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is this a run folder"):
        write_report(RunFolder(tmp_path), {}, {})


@pytest.mark.parametrize("name", ["config.json", "run.json", "training_info.json", "text_samples.json"])
def test_damaged_files_of_a_run_are_one_message(folder: RunFolder, name: str) -> None:
    for text in ("[", "[" * 100_000, "[1]", "null", '"x"', '{"step": 1}', '[{"step": "x"}]', '[{"step": 1}]'):
        (folder.path / name).write_text(text)
        if (name, text) == ("run.json", '{"step": 1}'):
            continue  # shown as it is
        with pytest.raises(UserError, match=name):
            write_report(folder, {}, {})


def test_newest_samples_come_first_and_older_ones_are_thinned() -> None:
    samples = [{"step": step, "input": "", "output": "", "accuracy": None} for step in range(1, 201)]
    steps = [step for step, _ in _samples_by_step(samples)]
    assert steps[0] == 200
    assert len(steps) <= OLDER_SAMPLES + 1
    assert _samples_by_step([]) == []


def test_nested_values_become_tables() -> None:
    values = {
        "documents": 12,
        "dropped": {"a": {"short": 1, "binary": 2}, "b": {"short": 3, "binary": 4}},
        "licenses": {"MIT": 3},
    }
    first, dropped, licenses = tables(values)
    assert [cell.text for cell in first.rows[0]] == ["documents", "12"]
    assert list(dropped.headers) == ["", "short", "binary"]
    assert [[cell.text for cell in row] for row in dropped.rows] == [["a", "1", "2"], ["b", "3", "4"]]
    assert licenses.title == "licenses"


def test_a_pipe_in_the_place_of_a_chart_is_one_message(folder: RunFolder) -> None:
    folder.latest_chart.unlink()
    os.mkfifo(folder.latest_chart)
    with pytest.raises(UserError, match=r"it is a pipe, not a file.*expected a chart"):
        write_report(folder, {}, {})
