"""Writes everything that a run logs to the run folder, and summaries with CLU.

`clu.metric_writers` imports TensorFlow, which takes seconds. It is imported in a separate thread when the first summary
is written, so that neither the start of a run nor the plain log files wait for it.
"""

import concurrent.futures
import functools
import importlib.util
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import clu.parameter_overview
import numpy as np

from smallcoder_jax.base.display import printable
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import finite
from smallcoder_jax.config import LogConfig
from smallcoder_jax.report import charts
from smallcoder_jax.report.boundaries import Boundaries, draw_boundaries
from smallcoder_jax.report.log_files import LogFiles
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.report.wandb import WandbWriter

QUEUE_LIMIT = 256  # log entries waiting to be written before the caller waits too
PENDING_LIMIT = 512  # summaries kept while TensorFlow loads


def parameter_table(params: Mapping[Any, Any]) -> str:
    """A table with the path, shape, type and size of every parameter, and the total size.

    `params` is a nested dict of arrays or `jax.ShapeDtypeStruct`. Layer numbers may be int keys.
    """
    return clu.parameter_overview.get_parameter_overview(_text_keys(params), include_stats=False)


def _text_keys(params: Mapping[Any, Any]) -> dict[str, Any]:
    """Converts int keys to text of equal width, because CLU sorts rows by their path."""
    width = max((len(str(key)) for key in params if isinstance(key, int)), default=0)
    return {
        f"{key:0{width}d}" if isinstance(key, int) else str(key): _text_keys(value)
        if isinstance(value, Mapping)
        else value
        for key, value in params.items()
    }


class MetricsLog:
    """Writes everything that a run logs on one background thread, so that no method waits for a disk.

    An error on that thread is raised by the next call. Methods must be called from one thread, on process 0 only.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        log: LogConfig,
        run_name: str,
        config_dict: Mapping[str, Any],
        resume_step: int,
        evaluated_step: int,
        notify: Callable[[str], None] = print,
    ) -> None:
        """Opens the logs of `folder`. Keeps entries up to `resume_step` (0: none), and evaluations up to
        `evaluated_step`.

        `notify` is called with messages for the user, such as that a summary writer is off, and why. Raises UserError
        if a log is damaged, or if W&B is requested but its package is not installed.
        """
        self._folder = folder
        self._writers: list[TensorBoardWriter | WandbWriter] = []
        status = {"tensorboard": "off", "wandb": "off"}
        if log.tensorboard:
            if TensorBoardWriter.available():
                self._writers.append(TensorBoardWriter(folder.tensorboard, resume_step))
                status["tensorboard"] = "on"
            else:
                status["tensorboard"] = "off, needs pip install 'smallcoder_jax[tensorboard]'"
                notify(f"TensorBoard: {status['tensorboard']}")
        if log.wandb != "off":
            wandb_writer = WandbWriter(
                folder, mode=log.wandb, run_name=run_name, config_dict=config_dict, notify=notify
            )
            self._writers.append(wandb_writer)
            status["wandb"] = wandb_writer.mode
        # Opened after W&B, which may fail, so that a failed start does not change any log.
        self._files = LogFiles(folder, resume_step, evaluated_step)
        folder.update_run_json(**status)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._waiting: deque[concurrent.futures.Future[None]] = deque()
        # Written with the first step, because a summary starts the import of TensorFlow, which would delay the start.
        self._first_texts = {} if resume_step else {"config": _code(json.dumps(finite(config_dict), indent=2))}

    def train(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs a training step: loss, learning_rate, grad_norm, tokens_per_second and other values.

        Units: loss in nats per token, step_time and data_wait in seconds per step, accuracy and mfu as shares.
        """
        row = _row(step, values)
        self._submit(self._files.train, row)
        if self._first_texts:
            self._submit(self._summarise, "write_texts", 0, self._first_texts)
            self._first_texts = {}
        self._submit(self._summarise, "write_scalars", step, _scalars("train", row))

    def evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs an evaluation, as summarised by the stage."""
        row = _row(step, values)
        self._submit(self._files.evaluation, row)
        self._submit(self._summarise, "write_scalars", step, _scalars("eval", row))

    def references(self, bits_per_byte: Mapping[str, float]) -> None:
        """Sets the bits per byte that the charts show for comparison, by name: {'gzip -9': 1.98, 'xz -9e': 1.87}."""
        self._submit(self._files.references.update, dict(bits_per_byte))

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Logs samples of generated text, each {input, output, accuracy}. `output` is the model's text."""
        kept = [dict(sample) for sample in samples]
        self._submit(self._files.samples, step, kept)
        texts = {f"sample/{i}": _code(f"{sample['input']}┆{sample['output']}") for i, sample in enumerate(kept)}
        self._submit(self._summarise, "write_texts", step, texts)

    def histograms(self, step: int, weights: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None:
        """Logs histograms of host arrays by parameter path."""
        arrays = {f"weights/{name}": array for name, array in weights.items()}
        arrays |= {f"gradients/{name}": array for name, array in gradients.items()}
        self._submit(self._write_histograms, step, arrays)

    def image(self, step: int, name: str, png_path: Path) -> None:
        """Logs an existing PNG file."""
        self._submit(self._write_image, step, name, png_path)

    def charts(self, step: int) -> None:
        """Draws the charts of everything logged so far, and writes `metrics_history.json`."""
        self._submit(self._draw_charts, step)

    def boundaries(self, step: int, found: Boundaries) -> None:
        """Draws where the model's chunks begin in a text."""
        self._submit(self._draw_boundaries, step, found)

    def flush(self) -> None:
        """Waits until everything logged so far is in the plain files, including `metrics_history.json`.

        Summaries may still wait for TensorFlow to load; `close` waits for those too.
        """
        self._submit(self._files.write_history)
        for writer in self._writers:
            self._submit(writer.flush)
        while self._waiting:
            self._finish_oldest()

    def close(self) -> None:
        """Writes the rest and closes all files. The log cannot be used afterwards."""
        for close in (self._files.close, *(writer.close for writer in self._writers)):
            self._waiting.append(self._executor.submit(close))  # also after an error, which is raised below
        self._executor.shutdown(wait=True)
        while self._waiting:
            self._finish_oldest()

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= QUEUE_LIMIT):
            self._finish_oldest()
        self._waiting.append(self._executor.submit(function, *arguments))

    def _finish_oldest(self) -> None:
        try:
            self._waiting.popleft().result()
        except OSError as error:
            raise UserError(
                f"the logs in {self._folder.path} cannot be written: {error}; make room or choose another workdir, "
                "then run the same command to continue from the last checkpoint"
            ) from error

    # The methods below run on the background thread.

    def _summarise(self, method: str, step: int, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            getattr(writer, method)(step, values)

    def _write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._summarise(
            "write_histograms", step, {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        )

    def _write_image(self, step: int, name: str, png_path: Path) -> None:
        if self._writers:
            self._summarise("write_images", step, {name: charts.read_png(png_path)})

    def _draw_charts(self, step: int) -> None:
        self._files.write_history()
        path = charts.draw_training(self._files.history(), self._folder, step)
        self._write_image(step, "charts/training", path)

    def _draw_boundaries(self, step: int, found: Boundaries) -> None:
        self._write_image(step, "charts/boundaries", draw_boundaries(found, self._folder, step))


class SilentLog:
    """The log of every process but the first. It writes nothing."""

    def train(self, step: int, values: Mapping[str, float | None]) -> None: ...
    def evaluation(self, step: int, values: Mapping[str, float | None]) -> None: ...
    def references(self, bits_per_byte: Mapping[str, float]) -> None: ...
    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None: ...
    def histograms(self, step: int, weights: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None: ...
    def charts(self, step: int) -> None: ...
    def boundaries(self, step: int, found: Boundaries) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _row(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """A log row of plain Python numbers, without values that are None."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return {"step": int(step), **{name: value for name, value in plain.items() if value is not None}}


def _code(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "    " + printable(text).replace("\n", "\n    ")


def _scalars(group: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {f"{group}/{name}": float(value) for name, value in row.items() if name != "step"}


class TensorBoardWriter:
    """CLU's summary writer. The first summary opens it on a separate thread. Until it is open, summaries are queued."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._open = functools.partial(_open_summary_writer, folder, resume_step)
        self._opening: concurrent.futures.Future[Any] | None = None
        self._pending: list[tuple[str, int, Mapping[str, Any]]] = []

    @staticmethod
    def available() -> bool:
        """Whether the [tensorboard] extra is installed. Imports nothing."""
        return all(importlib.util.find_spec(name) is not None for name in ("tensorflow", "tensorboard"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write("write_scalars", step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write("write_texts", step, texts)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._write("write_histograms", step, arrays)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._write("write_images", step, images)

    def flush(self) -> None:
        """Writes everything logged so far to disk, unless TensorFlow is still loading."""
        if self._opening is not None and self._opening.done():
            self._drain().flush()

    def close(self) -> None:
        """Waits for TensorFlow if it is loading, writes the rest and closes the events file."""
        if self._opening is not None:
            self._drain().close()

    def _write(self, method: str, step: int, values: Mapping[str, Any]) -> None:
        if self._opening is None:
            executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
            self._opening = executor.submit(self._open)
            executor.shutdown(wait=False)
        self._pending.append((method, step, values))
        # Histograms are as large as the model, so they are written at once, even if this waits for TensorFlow.
        if self._opening.done() or len(self._pending) >= PENDING_LIMIT or method == "write_histograms":
            self._drain()

    def _drain(self) -> Any:
        assert self._opening is not None
        writer = self._opening.result()
        for method, step, values in self._pending:
            getattr(writer, method)(step, values)
        self._pending.clear()
        return writer


def _open_summary_writer(folder: Path, resume_step: int) -> Any:
    """Imports TensorFlow without output and without accelerators, and opens the run's events file for writing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else a notice is printed at any log level
    import tensorflow as tf
    from clu.metric_writers import SummaryWriter

    tf.config.set_visible_devices([], "GPU")
    _drop_later_events(folder, resume_step)
    return SummaryWriter(str(folder))


def _drop_later_events(folder: Path, resume_step: int) -> None:
    """Rewrites the events files without events after `resume_step`; 0 removes them."""
    import tensorflow as tf

    for path in sorted(folder.glob("events.out.tfevents.*")):
        neighbour = path.with_name(f".{path.name}.partial")
        if resume_step:
            with tf.io.TFRecordWriter(str(neighbour)) as kept:
                try:
                    records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
                    for record in cast(Iterator[bytes], records):
                        if tf.compat.v1.Event.FromString(record).step <= resume_step:
                            kept.write(record)
                except tf.errors.DataLossError:
                    pass  # the last event was cut off when the run was killed
            neighbour.replace(path)
        else:
            path.unlink()
