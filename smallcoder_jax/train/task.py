"""What a stage hands the loop, and what makes a run this run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from smallcoder_jax.config import Config, to_dict
from smallcoder_jax.data.rows.prefetch import BatchIterator
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.verification import Verification
from smallcoder_jax.models import build
from smallcoder_jax.ops import precision
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.step import LossFn


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with in place of drawn parameters. `params`: unrolled. `facts`: where they are from."""

    params: build.Params
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage supplies: a loss and batches, and what is to be said about the data.

    Batches are given as those rows of the global ones that this process holds, named by their numbers.
    """

    loss_fn: LossFn
    summarise: Callable[[dict[str, float]], dict[str, float]]  # the loss's sums, `weight` among them, to what is logged
    train_batches: Callable[[Sequence[int]], BatchIterator]
    validation_batches: Callable[[int, Sequence[int]], Iterable[dict[str, np.ndarray]]]  # at most so many; 0: all
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
    frozen: build.Params = dataclasses.field(default_factory=dict)  # not trained, joined to the others for the loss
    prompts: Mapping[str, Sequence[int]] | None = None  # for samples, by what is shown; None: those of the config
    # As validation_batches, with what the loss needs alone, where the rest takes long to work out.
    loss_batches: Callable[[int, Sequence[int]], Iterable[dict[str, np.ndarray]]] | None = None
    # Data that depends on the model: shown all parameters before each batch is drawn and before each evaluation.
    see: Callable[[build.Params], None] | None = None


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
