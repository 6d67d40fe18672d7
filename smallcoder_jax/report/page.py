"""Writes report.html: one page about a run, its results and how to reproduce it. It needs no network."""

from __future__ import annotations

import base64
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from smallcoder_jax.base.display import printable
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_bytes, read_json_object, utc_now, write_bytes
from smallcoder_jax.base.terminal import human_count, human_time
from smallcoder_jax.config import KINDS, to_dict
from smallcoder_jax.configfile import load_config
from smallcoder_jax.report.log_files import read_samples
from smallcoder_jax.report.run_folder import RunFolder

TEMPLATES = Path(__file__).parent / "templates"
INFO = {
    "parameters",
    "steps",
    "tokens_seen",
    "train_seconds",
    "best_val_loss",
}  # entries of training_info.json that are shown at the top
MOST_COLUMNS = 8  # of a table of records; with more columns, the table is transposed
NAMES = ("spec", "source", "name", "variant")  # keys by which a record is named, if it has one of them
OLDER_SAMPLES = 20  # earlier steps whose samples are shown in addition to the last step's, spread over the run


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    number: bool  # aligned to the right


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the page. Without `headers`, the first column has names and the second one values."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def write_report(folder: RunFolder, accounting: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Writes `report.html` from the files of the run folder, and returns its path.

    Args:
      folder: a run with at least `config.json`. Charts, samples, `run.json` and `training_info.json` are shown if
        they exist.
      accounting: the origin of the data and what was dropped, as nested dicts and lists of dicts. Each becomes a table.
      results: the results of the run in the same form. "bits per byte" is shown at the top, too.

    Raises UserError if a file of the run is missing or damaged.
    """
    if not folder.config_json.exists():
        raise UserError(f"{folder.config_json} does not exist; is this a run folder?")
    config = to_dict(load_config(str(folder.config_json), []))
    info = _read_optional(folder.training_info_json, "training information")
    if info and not info.keys() >= INFO:
        raise UserError(f"{folder.training_info_json} lacks {', '.join(sorted(INFO - info.keys()))}; remove it")
    run = _read_optional(folder.run_json, "the identity of a run")
    samples = read_samples(folder.text_samples_json)
    page = _template("report.html").render(
        name=info.get("variant_name", config["name"]),
        written_at=utc_now(),
        dummy_data=info.get("dummy_data", False),
        figures=_figures(info, results),
        results=tables(results),
        chart=_inline_png(folder.latest_chart),
        boundaries=_inline_png(folder.boundaries_chart),
        samples=_samples_by_step(samples),
        accounting=tables(accounting),
        model=tables(config["model"]),
        settings=tables({key: value for key, value in config.items() if key not in ("model", "name")}),
        environment=tables(_environment(run)),
        identity=tables(run.get("identity", {})),
        commands=_commands(folder, run, config),
    )
    write_bytes(folder.report_html, page.encode())
    return folder.report_html


def write_stages_report(path: Path, name: str, results: Mapping[str, Any], folders: Mapping[str, RunFolder]) -> None:
    """Writes one page about several runs: `results` as in `write_report`, and the chart and report of each stage."""
    stages = [
        {
            "name": stage,
            "report": Path(os.path.relpath(folder.report_html, path.parent)).as_posix(),
            "chart": _inline_png(folder.latest_chart),
        }
        for stage, folder in folders.items()
    ]
    page = _template("stages.html").render(name=name, written_at=utc_now(), results=tables(results), stages=stages)
    write_bytes(path, page.encode())


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # Markup was rendered already
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def tables(values: Mapping[str, Any], title: str = "") -> list[Table]:
    """Converts nested values to tables.

    Single values share a table of names and values, similar records share one with headers, and everything else gets
    tables under its own name.
    """
    single, nested = [], []
    for name, value in values.items():
        label = name.replace("_", " ")
        inner_title = f"{title}: {label}" if title else label
        records = _records(value)
        if records:
            nested.append(_record_table(inner_title, records))
        elif isinstance(value, Mapping) and value:
            nested += tables(value, inner_title)
        else:
            single.append((Cell(label, False), _cell(value)))
    return ([Table(title, (), single)] if single else []) + nested


def _records(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The named records of a value, if it is a list of dicts or a dict of several dicts with the same keys."""
    if isinstance(value, Mapping):
        inner = list(value.values())
        alike = len(inner) > 1 and all(isinstance(item, Mapping) and item.keys() == inner[0].keys() for item in inner)
        return [(str(name), _flat(item)) for name, item in value.items()] if alike else []
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return [("", _flat(item)) for item in value]
    return []


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {prefix + str(name): value}
    return flat


def _record_table(title: str, records: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    named = any(name for name, _ in records)
    if len(columns) > MOST_COLUMNS:
        return _turned(title, columns, records)
    rows = [
        [Cell(name.replace("_", " "), False)] * named + [_cell(record.get(column)) for column in columns]
        for name, record in records
    ]
    return Table(title, [""] * named + [column.replace("_", " ") for column in columns], rows)


def _turned(title: str, columns: Sequence[str], records: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """The transposed table: one named column for each record, and one row for each key."""
    key = next((key for key in NAMES if all(key in record for _, record in records)), "")
    headers = [name or str(record.get(key, index)) for index, (name, record) in enumerate(records, 1)]
    rows = [
        [Cell(column.replace("_", " "), False), *(_cell(record.get(column)) for _, record in records)]
        for column in columns
        if column != key
    ]
    return Table(title, ["", *headers], rows)


def _cell(value: Any) -> Cell:
    if value is None or value == "":
        return Cell("-", False)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", False)
    if isinstance(value, int):
        return Cell(f"{value:,}", True)
    if isinstance(value, float):
        return Cell(f"{value:,.0f}" if abs(value) >= 1e5 and value.is_integer() else f"{value:.5g}", True)
    if isinstance(value, list | tuple):
        return Cell(
            ", ".join(repr(item) if isinstance(item, str) else _cell(item).text for item in value) or "-", False
        )
    return Cell(str(value), False)


def _figures(info: Mapping[str, Any], results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers at the top of the page: (name, value)."""
    figures = []
    if info:
        figures += [
            ("parameters", human_count(info["parameters"])),
            ("steps", f"{info['steps']:,}"),
            ("tokens seen", human_count(info["tokens_seen"])),
            ("training time", human_time(info["train_seconds"])),
        ]
        if info["best_val_loss"] is not None:
            figures.append(("best validation loss", f"{info['best_val_loss']:.4f}"))
    bits_per_byte = results.get("bits per byte")
    if isinstance(bits_per_byte, float):
        figures.append(("bits per byte", f"{bits_per_byte:.3f}"))
    return figures


def _samples_by_step(samples: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """The samples of the last step, then those of earlier steps, evenly thinned."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    newest_first = sorted(by_step.items(), reverse=True)
    stride = max(1, -(-(len(newest_first) - 1) // OLDER_SAMPLES))
    return newest_first[:1] + newest_first[1::stride]


def _environment(run: Mapping[str, Any]) -> dict[str, Any]:
    own_sections = ("identity", "command", "starts")
    starts = [{"started": start["at"], "command": start["command"]} for start in run.get("starts", [])]
    return {key: value for key, value in run.items() if key not in own_sections} | {"starts": starts}


def generate_command(path: Path, config: Mapping[str, Any]) -> str:
    """The command to try the run in `path`: a chat if the model was trained on conversations, else a completion."""
    how = "--chat" if learned_turns(config) else "--prompt 'def main():'"
    return f"python -m tools.generate --checkpoint {shlex.quote(str(path))} {how}"


def learned_turns(config: Mapping[str, Any]) -> bool:
    """Whether the stage of a config (as JSON) trains a model on conversations."""
    reads = KINDS[config.get("stage", {}).get("name", "pretrain")].reads
    if reads == "preferences":
        return any(source.strip() != "code" for source in config["preferences"]["sources"].split(","))
    if reads == "prompts":
        return config["rl"]["prompts"] == "conversations"
    return reads == "conversations"


def _commands(folder: RunFolder, run: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    commands = []
    git = run.get("git")
    if git:
        changed = "  # plus changes that were not committed" if git["changed"] else ""
        commands.append(f"git checkout {git['revision']}{changed}")
    if "command" in run:
        commands.append(run["command"])
    return [
        *commands,
        f"python -m tools.verify_models --run {shlex.quote(str(folder.path))}",
        generate_command(folder.path, config),
    ]


def _read_optional(path: Path, what: str) -> dict[str, Any]:
    return read_json_object(path, what) if path.exists() else {}


def _inline_png(path: Path) -> str | None:
    """A PNG as a data URL, so that the page is a single file; None if there is no PNG yet."""
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(read_bytes(path, "a chart as PNG")).decode("ascii")
