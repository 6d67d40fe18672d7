"""The plain log files of a run: metrics.jsonl, the CSVs, metrics_history.json, text_samples.json.

A run that continues at step s first drops entries after s, so that every step is logged once. Nothing here is
thread-safe: only one thread may call it at a time.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import (
    finite,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    write_bytes,
    write_json,
)
from smallcoder_jax.report.run_folder import RunFolder

TRAINING_COLUMNS = (
    "step",
    "loss",
    "accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "step_time",
    "data_wait",
    "mfu",
    "tokens_seen",
)
EVALUATION_COLUMNS = ("step", "loss", "perplexity", "bits_per_byte", "accuracy", "top5_accuracy")
HISTORY_NAMES = {"step": "steps", "tokens_per_second": "throughput"}  # other columns keep their names
SAMPLE_KEYS = ("input", "output", "accuracy")
MAX_LOG_BYTES = 1 << 32  # hundreds of bytes for each of millions of steps


class JsonLines:
    """A file with one JSON object per step. It is rewritten with `rows`, then appended to and flushed line by line."""

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        write_bytes(path, "".join(map(_json_line, rows)).encode())
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; NaN and infinities are written as null."""
        self._file.write(_json_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no file.

    A last line that was cut off while being written is ignored. Raises UserError when another line is not an object of
    numbers with a step.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(read_bytes(path, "a log of a run", MAX_LOG_BYTES).split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line)
            if not all(isinstance(value, int | float | None) for value in row.values()):
                raise ValueError
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: expected a JSON object of numbers with a 'step'; remove the line"
            ) from error
    return rows


class CsvLog:
    """A CSV file with one row per step, appended to and flushed row by row.

    Columns keep their order, even over restarts. A new key adds a column at the end.
    """

    def __init__(self, path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self._path = path
        self._columns = list(columns)
        self._rewrite(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; NaN and infinities are written as 'nan' and 'inf', a missing value as nothing."""
        new = [name for name in row if name not in self._columns]
        if new:
            self._file.close()
            self._columns += new
            self._rewrite([*read_csv(self._path)[1], row])
        else:
            self._file.write(_csv_lines(self._columns, [row]))
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        header = ",".join(self._columns) + "\n"
        write_bytes(self._path, (header + _csv_lines(self._columns, rows)).encode())
        self._file = self._path.open("a", newline="", encoding="utf-8")


def _csv_lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and rows of a log; empty if there is no file.

    Numbers are converted, and empty cells and a last line that was cut off are left out. Raises UserError if another
    line has no step.
    """
    if not path.exists():
        return [], []
    text = read_bytes(path, "a log of a run", MAX_LOG_BYTES).decode("utf-8", "replace")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        columns = list(reader.fieldnames or [])
        rows = [
            {name: _number(cell) for name, cell in row.items() if cell} | {"step": int(row["step"])} for row in reader
        ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file of numbers with a column 'step' ({error}); remove it") from error
    return columns, rows


def _number(cell: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The content of `text_samples.json`; empty if there is no file. Raises UserError when it is damaged."""
    what = "a list of text samples, with step, input, output and accuracy each; remove it"
    samples = read_json(path, what) if path.exists() else []
    kinds = {"step": int, "input": str, "output": str, "accuracy": int | float | None}
    if not isinstance(samples, list) or not all(
        isinstance(sample, dict) and all(key in sample and isinstance(sample[key], kind) for key, kind in kinds.items())
        for sample in samples
    ):
        raise UserError(f"{path} is damaged; expected {what}")
    return samples


def read_references(path: Path) -> dict[str, float]:
    """The compressors' bits per byte in `metrics_history.json`; empty without a file. Raises UserError if damaged."""
    references = read_json_object(path, "a metrics history; remove it").get("references", {}) if path.exists() else {}
    if not isinstance(references, dict) or not all(isinstance(value, int | float) for value in references.values()):
        raise UserError(f"{path} is damaged: expected numbers by name in 'references'; remove it")
    return references


class Samples:
    """`text_samples.json`: the model's samples, with their steps."""

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self._path, self.rows = path, rows
        write_json(path, self.rows)

    def append(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds samples. Only `input`, `output` and `accuracy` of a sample are stored."""
        self.rows += [{"step": step, **{key: sample.get(key) for key in SAMPLE_KEYS}} for sample in samples]
        write_json(self._path, self.rows)


class LogFiles:
    """All plain log files of a run, and the history from which charts and `metrics_history.json` are made."""

    def __init__(self, folder: RunFolder, resume_step: int, evaluated_step: int) -> None:
        """Keeps entries up to `resume_step`, and evaluations up to `evaluated_step`; 0 starts with empty logs."""
        train_columns, train_rows = read_csv(folder.training_log_csv)
        eval_columns, eval_rows = read_csv(folder.eval_log_csv)
        json_rows = read_json_lines(folder.metrics_jsonl)
        samples = read_samples(folder.text_samples_json) if evaluated_step else []
        self._history_path = folder.metrics_history_json
        self.references = read_references(self._history_path) if resume_step else {}  # bits per byte by compressor
        # Everything has been read by now, so a start that is refused does not change any log.

        def kept(rows: list[dict[str, Any]], last: int = resume_step) -> list[dict[str, Any]]:
            return [row for row in rows if row["step"] <= last] if resume_step else []

        eval_rows = kept(eval_rows, evaluated_step)
        self._jsonl = JsonLines(folder.metrics_jsonl, kept(json_rows))
        self._train = CsvLog(folder.training_log_csv, _columns(train_columns, TRAINING_COLUMNS), kept(train_rows))
        self._evaluation = CsvLog(folder.eval_log_csv, _columns(eval_columns, EVALUATION_COLUMNS), eval_rows)
        self._samples = Samples(folder.text_samples_json, [row for row in samples if row["step"] <= evaluated_step])
        self._train_history = Columns(TRAINING_COLUMNS, kept(json_rows))
        self._eval_history = Columns(EVALUATION_COLUMNS, eval_rows)
        self.write_history()

    def train(self, row: Mapping[str, Any]) -> None:
        self._jsonl.append(row)
        self._train.append(row)
        self._train_history.append(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._evaluation.append(row)
        self._eval_history.append(row)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        self._samples.append(step, samples)

    def history(self) -> dict[str, Any]:
        """The history as lists: `steps, loss, accuracy, throughput, ...` of training, and `eval_steps, eval_loss,
        eval_bits_per_byte, ...` of evaluation.

        Lists of the same kind have equal length, with None where a step has no finite value. `references` holds the
        bits per byte of each compressor.
        """
        train = {HISTORY_NAMES.get(name, name): values for name, values in self._train_history.values.items()}
        evaluation = {
            f"eval_{HISTORY_NAMES.get(name, name)}": values for name, values in self._eval_history.values.items()
        }
        return {**train, **evaluation, "references": self.references}

    def write_history(self) -> None:
        write_json(self._history_path, self.history())

    def close(self) -> None:
        self.write_history()
        self._jsonl.close()
        self._train.close()
        self._evaluation.close()


def _columns(recorded: Sequence[str], standard: Sequence[str]) -> list[str]:
    return [*recorded, *(name for name in standard if name not in recorded)]


class Columns:
    """Converts rows to one list per key, with None where a row lacks the key or its value is not finite."""

    def __init__(self, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self.values: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        length = len(self.values["step"])
        for name in row:
            self.values.setdefault(name, [None] * length)
        for name, values in self.values.items():
            value = row.get(name)
            values.append(None if isinstance(value, float) and not math.isfinite(value) else value)
