"""A summary writer for Weights & Biases with the methods of `clu.metric_writers.MetricWriter` that the log calls.

The `wandb` package is imported only when a writer is created.
"""

from __future__ import annotations

import importlib
import importlib.util
import netrc
import os
import secrets
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from smallcoder_jax.base.display import one_line, printable
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import finite
from smallcoder_jax.report.run_folder import RunFolder

HISTOGRAM_BINS = 64


class WandbWriter:
    """Logs to W&B, either to local files (`offline`) or to the service (`online`).

    Without a key, `online` becomes `offline`, and `notify` is called. Raises UserError if the package is missing.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        mode: Literal["offline", "online"],
        run_name: str,
        config_dict: Mapping[str, Any],
        notify: Callable[[str], None],
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(f"log.wandb={mode!r} needs the wandb package: pip install 'smallcoder_jax[wandb]'")
        wandb = importlib.import_module("wandb")
        if mode == "online" and not _has_key():
            mode = "offline"
            notify(f"W&B: offline, no key (`wandb login`); upload it with: wandb sync {folder.wandb}/offline-run-*")
        folder.wandb.mkdir(parents=True, exist_ok=True)
        self.mode = mode
        self._wandb = wandb
        # The id of the W&B run is stored in the run folder, so that a continued run continues it even after a move.
        recorded = folder.read_run_json() if folder.run_json.exists() else {}
        identifier = recorded.get("wandb_id") or secrets.token_hex(8)
        folder.update_run_json(wandb_id=identifier)
        self._run = wandb.init(
            project="smallcoder_jax",
            name=one_line(run_name),
            id=identifier,
            dir=str(folder.path),
            config=finite(config_dict),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        table = self._wandb.Table(
            columns=["step", "name", "text"],
            data=[[step, one_line(name), printable(text)] for name, text in texts.items()],
        )
        self._run.log({"texts": table}, step=step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        histograms = {
            name: self._wandb.Histogram(np_histogram=np.histogram(array[np.isfinite(array)], HISTOGRAM_BINS))
            for name, array in arrays.items()
        }
        self._run.log(histograms, step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """`images`: uint8 `[height, width, channels]` by name."""
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def flush(self) -> None:
        """Does nothing: W&B sends by itself, and only `close` has to wait."""

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """Whether W&B would find a key, in the environment or where `wandb login` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
