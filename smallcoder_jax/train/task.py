"""What a stage hands the loop, and what makes a run this run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from smallcoder_jax.config import Config, ModelConfig, to_dict
from smallcoder_jax.data.rows.prefetch import BatchIterator
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.verification import Verification
from smallcoder_jax.models import build
from smallcoder_jax.ops import precision
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.step import LossFn
from smallcoder_jax.train.sums import ratio


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with in place of drawn parameters. `params`: all parts, unrolled. `facts`: their origin."""

    params: build.Params
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a task is given to evaluate a model: its parameters, the loss of a batch, and who adds up."""

    params: build.Params  # all parts, as `score` has them
    score: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]  # rows of a batch -> the loss's sums and `weight`
    add: Callable[[Iterable[Mapping[str, Any]]], dict[str, float] | None]  # `sums.add_up`; None: a signal came first
    drawn: Callable[[Iterable[Any]], Iterator[Any]]  # the same items, each of them waited for
    rows: Sequence[int]  # of each global batch, those of this process
    limit: int  # batches at most; 0: all
    loss_alone: bool = False  # nothing else is asked for, where it takes long to work out


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage supplies: a loss and batches, and what is to be said about the data.

    Batches are given as those rows of the global ones that this process holds, named by their numbers.
    """

    loss_fn: LossFn
    summarise: Callable[[dict[str, float]], dict[str, float]]  # the loss's sums, `weight` among them, to what is logged
    train_batches: Callable[[Sequence[int]], BatchIterator]
    # At most so many; 0: all. None come where a task is evaluated by other means.
    validation_batches: Callable[[int, Sequence[int]], Iterable[dict[str, np.ndarray]]]
    identity: dict[str, Any]  # what a resumed run must agree in
    tokenizer: Tokenizer
    dataset: str
    dummy_data: bool
    facts: dict[str, str]  # lines of the start table
    warnings: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  # of the data; training goes on
    accounting: Mapping[str, Any]  # where the data is from, for the report
    references: dict[str, float] = dataclasses.field(default_factory=dict)  # bits per byte of compressors, held out
    reported: tuple[str, ...] = ("accuracy",)  # sums of the loss that training steps log
    manifest: shards.Manifest | None = None  # of the token shards, where it reads any
    verification: Verification | None = None  # of these shards, begun
    start: Start | None = None
    frozen: build.Params = dataclasses.field(default_factory=dict)  # parts that are not trained; the loss sees all
    frozen_model: ModelConfig | None = None  # whose they are, where that is another than the config's
    prompts: Mapping[str, Sequence[int]] | None = None  # for samples, by what is shown; None: those of the config
    own_losses: tuple[str, ...] = ()  # of the model (`Family.losses`)
    # Data that depends on the model: given all parameters before each batch is drawn.
    on_params: Callable[[build.Params], None] | None = None

    def evaluate(self, evaluation: Evaluation) -> dict[str, float] | None:
        """What `summarise` says of the held-out batches, and the means of the model's own losses; None where a signal
        came before the end. Raises UserError where there is nothing held out."""
        batches = evaluation.drawn(self.validation_batches(evaluation.limit, evaluation.rows))
        sums = evaluation.add(map(evaluation.score, batches))
        if sums is None:
            return None
        return self.summarise(sums) | {name: ratio(sums[name], sums["weight"]) for name in self.own_losses}


def run_identity(config: Config, task: Task) -> dict[str, Any]:
    """What makes a run this run: its data and their order, the shape, and the arithmetic of its steps."""
    plain = to_dict(config)
    return {
        **({"start": task.start.facts["hash"]} if task.start else {}),
        "data": task.identity,
        "model": plain["model"],
        "optimizer": plain["optimizer"],
        "train": {
            key: plain["train"][key] for key in ("batch_size", "sequence_length", "microbatch_size", "z_loss", "seed")
        },
        **({"lora": plain["lora"]} if config.lora.rank else {}),
        "compute": {
            **{key: plain["compute"][key] for key in ("dtype", "layers")},
            # What was resolved: a run may not go on with other products on another machine.
            **({"matmul": "mixed"} if precision.choose(config.compute, jax.default_backend()).kind == "mixed" else {}),
        },
        "guard": {key: plain["guard"][key] for key in ("spike_sigma", "spike_window")},
        # A schedule that decays is another schedule when the number of steps differs.
        "steps": config.train.steps if config.optimizer.schedule != "constant" else "any",
    }
