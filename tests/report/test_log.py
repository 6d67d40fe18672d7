"""What a run logs: once per step, also over restarts, on a thread whose errors come back."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import LogConfig
from smallcoder_jax.report import charts, log_files
from smallcoder_jax.report import log as report_log
from smallcoder_jax.report.log import MetricsLog
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.train.sums import EvalMetrics, language_summary

PLAIN = LogConfig(tensorboard=False)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def open_log(folder: RunFolder, *, resume_step: int = 0, log: LogConfig = PLAIN, **options: Any) -> MetricsLog:
    return MetricsLog(
        folder,
        log=log,
        config_dict={"a": 1},
        resume_step=resume_step,
        evaluated_step=resume_step,
        **{"run_name": "nano", **options},
    )


def train_values(step: int) -> dict[str, float]:
    """A step's values: losses that only an exact writer brings back."""
    return {
        "loss": 1.0 / (step + 2),
        "learning_rate": 1e-3 / 3,
        "grad_norm": 0.1 * step,
        "tokens_per_second": 1e4 / 3,
        "data_wait": 0.0,
    }


def log_steps(log: MetricsLog, first: int, last: int, evaluate_every: int = 2) -> None:
    for step in range(first, last + 1):
        log.train(step, train_values(step))
        if step % evaluate_every == 0:
            log.evaluation(step, {"loss": 2.0 / step, "bits_per_byte": 1.0 / step})
            log.samples(step, [{"input": "def ", "output": f"f{step}()", "accuracy": None}])


def jsonl(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder: RunFolder) -> dict[str, bytes]:
    names = ("metrics.jsonl", "training_log.csv", "eval_log.csv", "metrics_history.json", "text_samples.json")
    return {name: (folder.path / name).read_bytes() for name in names}


# Evaluation sums.


def test_evaluation_sums_are_exact_however_unevenly_they_fall() -> None:
    total = EvalMetrics.empty()
    for nats, weight in ((10.0, 4), (1.0, 1), (0.0, 0)):
        batch = EvalMetrics.from_model_output(
            nats=nats, weight=weight, accuracy=weight / 2, top5_accuracy=weight, bytes=2 * weight
        )
        total = total.merge(batch)
    values = language_summary(total.compute())
    assert values["loss"] == 11 / 5
    assert values["perplexity"] == math.exp(11 / 5)
    assert values["bits_per_byte"] == pytest.approx(11 / math.log(2) / 10)
    assert (values["accuracy"], values["top5_accuracy"]) == (0.5, 1.0)


def test_evaluation_sums_take_host_arrays_and_touch_no_device() -> None:
    with jax.transfer_guard("disallow"):
        sums = {name: np.float32(2.0) for name in ("nats", "weight", "accuracy", "top5_accuracy", "bytes")}
        total = EvalMetrics.empty().merge(EvalMetrics.from_model_output(**sums))
    assert language_summary(total.compute())["loss"] == 1.0


@pytest.mark.parametrize(("nats", "weight", "expected"), [(0.0, 0.0, math.nan), (1e6, 1.0, math.inf)])
def test_evaluation_of_nothing_or_of_too_much(nats: float, weight: float, expected: float) -> None:
    values = language_summary({"nats": nats, "weight": weight, "accuracy": 0.0, "top5_accuracy": 0.0, "bytes": 0.0})
    np.testing.assert_equal(values["perplexity"], expected)
    assert math.isnan(values["bits_per_byte"])


def test_parameter_table_counts_and_orders_layers() -> None:
    kernel = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    params = {
        "embed": {"embedding": np.zeros((16, 4), np.float32)},
        "blocks": {i: {"kernel": kernel} for i in range(12)},
    }
    table = report_log.parameter_table(params)
    assert "Total: 448 -- 1,792 bytes" in table
    assert table.index("blocks/02/kernel") < table.index("blocks/10/kernel")


# Files.


def test_every_file_holds_what_was_logged(folder: RunFolder) -> None:
    log = open_log(folder)
    log_steps(log, 1, 4)
    log.references({"gzip -9": 1.98})
    log.close()
    assert jsonl(folder) == [{"step": step, **train_values(step)} for step in range(1, 5)]
    assert [float(row["loss"]) for row in csv_rows(folder.training_log_csv)] == [1 / 3, 1 / 4, 1 / 5, 1 / 6]
    assert [(row["step"], row["loss"]) for row in csv_rows(folder.eval_log_csv)] == [("2", "1.0"), ("4", "0.5")]
    assert json.loads(folder.text_samples_json.read_text())[1] == {
        "step": 4,
        "input": "def ",
        "output": "f4()",
        "accuracy": None,
    }
    history = json.loads(folder.metrics_history_json.read_text())
    rows = jsonl(folder)
    assert history["steps"] == [row["step"] for row in rows]
    assert history["throughput"] == [row["tokens_per_second"] for row in rows]
    for name in ("loss", "learning_rate", "grad_norm", "data_wait"):
        assert history[name] == [row[name] for row in rows]
    assert history["accuracy"] == [None] * 4
    assert history["eval_steps"] == [2, 4]
    assert history["eval_bits_per_byte"] == [0.5, 0.25]
    assert history["references"] == {"gzip -9": 1.98}


def test_a_continued_run_has_every_step_once(folder: RunFolder, tmp_path: Path) -> None:
    straight = RunFolder(tmp_path / "straight")
    log = open_log(straight)
    log_steps(log, 1, 10)
    log.close()
    log = open_log(folder)
    log_steps(log, 1, 7)  # the last checkpoint was at 5
    log.close()
    log = open_log(folder, resume_step=5)
    assert max(row["step"] for row in jsonl(folder)) == 5
    log_steps(log, 6, 10)
    log.close()
    assert files_of(folder) == files_of(straight)


def test_lines_cut_off_by_a_kill_are_dropped(folder: RunFolder) -> None:
    log = open_log(folder)
    log_steps(log, 1, 4)
    log.close()
    for path in (folder.metrics_jsonl, folder.training_log_csv, folder.eval_log_csv):
        path.write_bytes(path.read_bytes()[:-6])
    log = open_log(folder, resume_step=4)
    log.close()
    assert [row["step"] for row in jsonl(folder)] == [1, 2, 3]
    assert [row["step"] for row in csv_rows(folder.training_log_csv)] == ["1", "2", "3"]
    assert [row["step"] for row in csv_rows(folder.eval_log_csv)] == ["2"]


def test_a_new_run_starts_with_empty_logs(folder: RunFolder) -> None:
    log = open_log(folder)
    log.evaluation(0, {"loss": 9.0})
    log_steps(log, 1, 3)
    log.close()
    open_log(folder, resume_step=0).close()
    assert jsonl(folder) == []
    assert csv_rows(folder.eval_log_csv) == []
    assert json.loads(folder.text_samples_json.read_text()) == []


def test_a_damaged_log_is_one_message(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.metrics_jsonl.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        open_log(folder, resume_step=5)


DAMAGED = [
    "[", "[" * 100_000, "[1]",
    '[{"step":"x"}]', '[{"step":1}]', "null", '"x"', '{"references": 5}', '{"references": {"a": "b"}}',
    '{"step": Infinity}\n', "[]\n", '{"step": 1, "loss": "x"}\n', '{"step": 1, "loss": [1]}\n', '{"step": 1e400}\n',
    "step,loss\n1,2\x00\n", "step\n1,2,3\n", '"' * 200_000 + "\n", "step\n" + "9" * 5000 + "\n",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "training_log.csv", "eval_log.csv", "metrics_history.json", "text_samples.json"]
)
def test_whatever_a_log_holds_it_is_read_or_refused_with_one_message(folder: RunFolder, name: str) -> None:
    refused: list[str] = []
    folder.path.mkdir()
    for text in DAMAGED:
        for path in folder.path.iterdir():
            path.unlink()
        (folder.path / name).write_text(text)
        try:
            files = log_files.LogFiles(folder, 5, 5)
        except UserError as error:
            refused.append(str(error))
            assert [path.name for path in folder.path.iterdir()] == [name]  # and nothing else is written
            continue
        files.train({"step": 6, "loss": 1.0})
        files.samples(6, [{"input": "a", "output": "b"}])
        history = files.history()
        for prefix in ("", "eval_"):
            charts._Curves(history, prefix).get("loss")
        assert all(isinstance(value, int | float) for value in history["references"].values())
        files.close()
        log_files.read_samples(folder.text_samples_json)
    assert len(refused) >= 3
    assert all(name in message for message in refused)


def test_not_a_number_is_null_in_json(folder: RunFolder) -> None:
    log = open_log(folder)
    values: dict[str, Any] = {"loss": math.nan, "grad_norm": math.inf, "learning_rate": np.float32(0.5), "mfu": None}
    log.train(1, values)
    log.close()
    assert jsonl(folder) == [{"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5}]
    assert csv_rows(folder.training_log_csv)[0]["loss"] == "nan"
    assert json.loads(folder.metrics_history_json.read_text())["loss"] == [None]
    open_log(folder, resume_step=1).close()
    assert csv_rows(folder.training_log_csv)[0]["grad_norm"] == "inf"


def test_columns_keep_their_order_and_new_ones_come_last(folder: RunFolder) -> None:
    log = open_log(folder)
    log.train(1, {"loss": 1.0})
    log.train(2, {"reward": 0.5, "loss": 1.0})
    log.close()
    log = open_log(folder, resume_step=2)
    log.train(3, {"loss": 1.0, "margin": 0.25, "reward": 0.75})
    log.close()
    rows = csv_rows(folder.training_log_csv)
    assert tuple(rows[0]) == (*log_files.TRAINING_COLUMNS, "reward", "margin")
    assert [row["reward"] for row in rows] == ["", "0.5", "0.75"]
    assert json.loads(folder.metrics_history_json.read_text())["reward"] == [None, 0.5, 0.75]


def test_samples_never_hold_a_target(folder: RunFolder) -> None:
    log = open_log(folder)
    log.samples(1, [{"input": "a", "output": "b", "accuracy": 0.5, "target": "c"}])
    log.close()
    assert json.loads(folder.text_samples_json.read_text()) == [
        {"step": 1, "input": "a", "output": "b", "accuracy": 0.5}
    ]


def test_references_survive_a_restart_and_reach_the_chart(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(folder)
    log.references({"xz -9e": 1.87})
    log_steps(log, 1, 2)
    log.close()
    drawn = []
    draw = charts.draw_training
    monkeypatch.setattr(charts, "draw_training", lambda history, *to: drawn.append(history) or draw(history, *to))
    log = open_log(folder, resume_step=2)
    log.charts(50)  # behind the last step that was logged
    log.close()
    assert drawn[0]["references"] == {"xz -9e": 1.87}
    assert (folder.charts / "training_step_000050.png").exists()
    assert folder.latest_chart.exists()


# The thread.


def test_logging_does_not_wait_for_the_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(folder)
    disk = threading.Event()
    write = log._files.train
    threads = set()

    def slow(row: dict[str, Any]) -> None:
        disk.wait(30)
        threads.add(threading.current_thread().name)
        write(row)

    monkeypatch.setattr(log._files, "train", slow)
    log_steps(log, 1, 20)
    assert jsonl(folder) == []  # all twenty were taken, and none is written yet
    disk.set()
    log.flush()
    assert [row["step"] for row in jsonl(folder)] == list(range(1, 21))
    assert threading.current_thread().name not in threads
    assert len(threads) == 1
    log.close()


def test_the_queue_is_bounded(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_log, "QUEUE_LIMIT", 8)
    log = open_log(folder)
    for step in range(1, 101):
        log.train(step, train_values(step))
        assert len(log._waiting) <= 8
    log.close()
    assert len(jsonl(folder)) == 100


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), UserError, "cannot be written: .*No space left on device"),
        (ZeroDivisionError("a mistake"), ZeroDivisionError, "a mistake"),
    ],
)
def test_an_error_of_the_thread_is_raised_by_the_next_call(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], message: str
) -> None:
    log = open_log(folder)

    def fail(row: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(log._files, "train", fail)
    with pytest.raises(raised, match=message):
        log_steps(log, 1, 100)  # a later step of these, at the latest when the log is closed
    log._waiting.append(log._executor.submit(fail, {}))  # an error that comes last is not lost either
    with pytest.raises(raised, match=message):
        log.close()


# Summaries.


def events(folder: RunFolder) -> list[Any]:
    """Every event of the run's TensorBoard files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [event for path in sorted(folder.tensorboard.iterdir()) for event in EventFileLoader(str(path)).Load()]


def tags(found: list[Any]) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for event in found:
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
    return steps


def test_tensorboard_holds_every_step_once(folder: RunFolder) -> None:
    from tensorboard.util import tensor_util

    log = open_log(folder, log=LogConfig())
    log_steps(log, 1, 4)
    log.close()
    log = open_log(folder, log=LogConfig(), resume_step=2)
    log_steps(log, 3, 4)
    log.close()
    found = events(folder)
    steps = tags(found)
    assert steps["train/loss"] == [1, 2, 3, 4]
    assert steps["eval/bits_per_byte"] == [2, 4]
    assert steps["sample/0"] == [2, 4]
    assert steps["config"] == [0]
    values = [value for event in found for value in event.summary.value if value.tag == "train/loss"]
    losses = [tensor_util.make_ndarray(value.tensor).item() for value in values]
    np.testing.assert_allclose(losses, [1 / 3, 1 / 4, 1 / 5, 1 / 6], rtol=1e-6)
    assert folder.read_run_json()["tensorboard"] == "on"


def test_tensorboard_holds_histograms_and_images(folder: RunFolder) -> None:
    log = open_log(folder, log=LogConfig())
    log.train(1, train_values(1))
    log.histograms(1, {"embed/embedding": np.ones((3, 2))}, {"embed/embedding": np.zeros((3, 2))})
    log.charts(1)
    log.image(1, "attention", charts.draw_training({}, RunFolder(folder.path / "other"), 0))
    log.close()
    steps = tags(events(folder))
    expected = ("weights/embed/embedding", "gradients/embed/embedding", "charts/training", "attention")
    assert all(steps[tag] == [1] for tag in expected)


def test_plain_files_do_not_wait_for_tensorflow(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            return lambda *_: self.calls.append(name)

    recorder = Recorder()

    def slow_import(folder: Path, resume_step: int) -> Recorder:
        loaded.wait(30)
        return recorder

    monkeypatch.setattr(report_log, "_open_summary_writer", slow_import)
    log = open_log(folder, log=LogConfig())
    log_steps(log, 1, 3)
    log.flush()
    assert len(jsonl(folder)) == 3
    assert recorder.calls == []
    loaded.set()
    log.close()
    assert recorder.calls.count("write_scalars") == 4
    assert recorder.calls[-1] == "close"


def test_without_the_extra_it_says_so_and_goes_on(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    log = open_log(folder, log=LogConfig(), notify=said.append)
    log_steps(log, 1, 2)
    log.close()
    assert said == ["TensorBoard: off, needs pip install 'smallcoder_jax[tensorboard]'"]
    assert folder.read_run_json()["tensorboard"].startswith("off, needs pip install")
    assert not folder.tensorboard.exists()
    assert len(jsonl(folder)) == 2


def test_wandb_without_its_package(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'smallcoder_jax\[wandb\]'"):
        open_log(folder, log=LogConfig(tensorboard=False, wandb="offline"))


def fake_wandb(calls: list[tuple[str, Any]]) -> types.ModuleType:
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((f"log {step}", values)), finish=lambda: calls.append(("finish", None))
    )
    names = {"Settings": dict, "Table": dict, "Histogram": dict, "Image": np.shape}
    module.__dict__.update(names, init=lambda **options: calls.append(("init", options)) or run)
    return module


@pytest.mark.parametrize(("key", "mode"), [("", "offline"), ("secret", "online")])
def test_wandb_online_needs_a_key(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, mode: str
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said: list[str] = []
    log = open_log(folder, log=LogConfig(tensorboard=False, wandb="online"), notify=said.append)
    log_steps(log, 1, 2)
    log.histograms(2, {"w": np.array([1.0, np.nan])}, {"w": np.zeros(2)})
    log.charts(2)
    log.close()
    assert calls[0][1]["mode"] == mode
    assert len(said) == (0 if key else 1)
    assert folder.read_run_json()["wandb"] == mode
    # Moved, the run is the same one; a copy of its config elsewhere is another.
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    open_log(
        moved, log=LogConfig(tensorboard=False, wandb="online"), notify=said.append, run_name="a\x1b\u202e"
    ).close()
    open_log(RunFolder(tmp_path / "other"), log=LogConfig(tensorboard=False, wandb="online")).close()
    first, again, other = [options for call, options in calls if call == "init"]
    assert first["id"] == again["id"] != other["id"]
    assert again["name"] == r"a\x1b\u202e"
    logged = [name for call, values in calls if call.startswith("log") for name in values]
    assert {"train/loss", "eval/loss", "texts", "weights/w", "charts/training"} <= set(logged)
    assert calls[-1][0] == "finish"


def test_importing_the_log_imports_no_tensorflow() -> None:
    program = (
        "import sys; from smallcoder_jax.report import log as m; m.MetricsLog; "
        "heavy = {'tensorflow', 'tensorboard', 'matplotlib', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(report_log.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
