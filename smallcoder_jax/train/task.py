"""The interface between stages and the training loop, and the identity of a run."""

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
    """The parameters that a run begins with instead of random ones. `params` holds the parts, unrolled, and `facts`
    says where they are from.
    """

    params: build.Params
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The tools with which a task evaluates a model."""

    params: build.Params  # all parts of the model that `score` uses
    score: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]  # rows of a batch -> sums of the loss, and `weight`
    add: Callable[[Iterable[Mapping[str, Any]]], dict[str, float] | None]  # `sums.add_up`; None: a signal came first
    drawn: Callable[[Iterable[Any]], Iterator[Any]]  # yields the same items; the watchdog times the wait for each
    rows: Sequence[int]  # this process's rows of each global batch
    limit: int  # of batches; 0: all
    loss_alone: bool = False  # only the loss is needed; other measures that take long may be left out


@dataclasses.dataclass(frozen=True)
class Task:
    """The contribution of a stage to a run: the loss, the batches, and facts about the data.

    Functions that return batches take the numbers of this process's rows in the global batch, and return only these.
    """

    loss_fn: LossFn
    summarise: Callable[[dict[str, float]], dict[str, float]]  # sums of the loss and `weight` -> the logged measures
    train_batches: Callable[[Sequence[int]], BatchIterator]
    # (limit of batches, 0: all; rows) -> batches. There are none if the task is evaluated in another way.
    validation_batches: Callable[[int, Sequence[int]], Iterable[dict[str, np.ndarray]]]
    identity: dict[str, Any]  # values that must be the same in a resumed run
    tokenizer: Tokenizer
    dataset: str
    dummy_data: bool
    facts: dict[str, str]  # lines of the start table
    warnings: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  # about the data; training continues
    accounting: Mapping[str, Any]  # the origin of the data, for the report
    references: dict[str, float] = dataclasses.field(default_factory=dict)  # compressors' bits per byte, held-out text
    reported: tuple[str, ...] = ("accuracy",)  # sums of the loss that training steps log
    manifest: shards.Manifest | None = None  # of the token shards, if it reads any
    verification: Verification | None = None  # of these shards, already running
    start: Start | None = None
    frozen: build.Params = dataclasses.field(default_factory=dict)  # parts that are not trained; the loss sees all
    frozen_model: ModelConfig | None = None  # the model that they belong to, if it is not the config's
    prompts: Mapping[str, Sequence[int]] | None = None  # for samples: text to show -> ids; None: those of the config
    logged: tuple[str, ...] = ()  # names of what the model itself reports (`Family.logged`)
    # For data that depends on the model: called with all parameters before each batch is taken.
    on_params: Callable[[build.Params], None] | None = None

    def evaluate(self, evaluation: Evaluation) -> dict[str, float] | None:
        """The result of `summarise` on the held-out batches, and the means of what the model reports; None when a
        signal came before the end. Raises UserError when there is no held-out data.
        """
        batches = evaluation.drawn(self.validation_batches(evaluation.limit, evaluation.rows))
        sums = evaluation.add(map(evaluation.score, batches))
        if sums is None:
            return None
        return self.summarise(sums) | {name: ratio(sums[name], sums["weight"]) for name in self.logged}


def run_identity(config: Config, task: Task) -> dict[str, Any]:
    """The values that identify a run: its data and their order, the model's shape, and the arithmetic of its steps."""
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
            # The resolved kind, so that a run cannot continue with other matrix products on another machine.
            **({"matmul": "mixed"} if precision.choose(config.compute, jax.default_backend()).kind == "mixed" else {}),
        },
        "guard": {key: plain["guard"][key] for key in ("spike_sigma", "spike_window")},
        # With another number of steps, a schedule that decays is a different one.
        "steps": config.train.steps if config.optimizer.schedule != "constant" else "any",
    }
