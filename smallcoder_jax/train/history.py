"""The history of a run: it is stored in checkpoints, and reported when the run ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class History:
    """Tokens and seconds of training, losses in the task's own unit, and the newest evaluation."""

    tokens_seen: int = 0
    train_seconds: float = 0.0
    best_loss: float = math.inf  # of the evaluations
    last_loss: float | None = None  # of the training steps
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    owes_evaluation: bool = False  # the newest step was not evaluated, because a signal came first

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> History:
        """The history from the values that `to_meta` returned when a checkpoint was saved."""
        names = [field.name for field in dataclasses.fields(cls)]
        history = cls(**{name: meta[name] for name in names if name != "owes_evaluation" or name in meta})
        history.best_loss = math.inf if meta["best_loss"] is None else meta["best_loss"]
        return history

    def to_meta(self) -> dict[str, Any]:
        """The history as plain JSON values."""
        return {**dataclasses.asdict(self), "best_loss": self.best_evaluated}

    @property
    def best_evaluated(self) -> float | None:
        """The best loss of an evaluation; None when there was no finite one."""
        return self.best_loss if np.isfinite(self.best_loss) else None

    @property
    def is_finite(self) -> bool:
        """Whether the loss of the newest evaluation is finite; true when there was none."""
        loss = self.evaluation.get("loss", 0.0)
        return loss is not None and bool(np.isfinite(loss))  # JSON stores a loss that is not finite as None

    def add_evaluation(self, values: dict[str, float]) -> bool:
        """Records the values of an evaluation of the newest step. Returns whether its loss is the best so far."""
        self.owes_evaluation, self.evaluation = False, values
        best = values["loss"] < self.best_loss
        self.best_loss = min(self.best_loss, values["loss"])
        return best
