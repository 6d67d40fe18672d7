"""The training loop: steps, optimizer, guard, evaluations, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config.fields import LARGEST_SEED, Section, number

LONGEST_WAIT = 1_000_000_000  # seconds; the longest timeout that a thread accepts


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    steps: int = number(10_000, low=1)  # optimizer steps
    batch_size: int = number(32, low=1)  # rows per optimizer step, over all devices
    sequence_length: int = number(2048, low=1)  # tokens per row; at most model.context
    # Gradient accumulation: rows processed at a time; a value above the batch size means the whole batch.
    microbatch_size: int = number(0, low=0, zero="the whole batch")
    z_loss: float = number(0.0, low=0)  # weight of logsumexp^2 (PaLM, arXiv 2204.02311)
    seed: int = number(0, low=0, high=LARGEST_SEED)
    log_every: int = number(10, low=1)

    @property
    def microbatch_rows(self) -> int:
        """The number of rows in one forward pass, over all devices."""
        return min(self.microbatch_size or self.batch_size, self.batch_size)

    def problems(self) -> Iterator[str]:
        if self.batch_size % self.microbatch_rows:
            yield (
                f"train.batch_size={self.batch_size} must be a multiple of train.microbatch_size={self.microbatch_size}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = number(3e-4, low=0)  # peak for AdamW
    muon_learning_rate: float = number(0.02, low=0)  # peak for the matrices that Muon updates
    muon_momentum: float = number(0.95, low=0, below=1)
    b1: float = number(0.9, low=0, below=1)
    b2: float = number(0.95, low=0, below=1)
    eps: float = number(1e-8, above=0, high=1)
    weight_decay: float = number(0.1, low=0)  # decoupled
    decay_pattern: str = r".*(kernel|embedding)$"  # parameters that decay, by path
    clip_norm: float = number(1.0, low=0, zero="no clipping")  # global gradient norm
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = number(500, low=0)
    decay_steps: int = number(0, low=0)  # wsd: length of the final linear decay
    final_ratio: float = number(0.1, low=0, high=1)  # learning rate at the end, as a fraction of the peak

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate that is shown: with Muon, that of its matrices."""
        return self.muon_learning_rate if self.name == "muon" else self.learning_rate

    def schedule_fault(self, steps: int) -> str:
        """A warning about a schedule over `steps` steps that is valid but probably a mistake; "" for none."""
        if self.warmup_steps > steps:
            return (
                "the peak of the learning rate is never reached: optimizer.warmup_steps="
                f"{self.warmup_steps} is more than train.steps={steps}, and the rate ends at "
                f"{steps / self.warmup_steps:.0%} of it"
            )
        if self.schedule == "wsd" and self.warmup_steps > steps - self.decay_steps:
            return (
                f"warm-up reaches into the decay: optimizer.warmup_steps={self.warmup_steps} and optimizer.decay_steps="
                f"{self.decay_steps} are together more than train.steps={steps}, and the rate jumps where warm-up ends"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class GuardConfig(Section):
    """How a run handles a loss or gradient that cannot be right, and how long it waits.

    An update from a non-finite loss or gradient is always skipped. A wait that takes too long ends the process, with
    the stacks of all threads and the exit code of a stalled run. 0 means no limit.
    """

    max_skipped: int = number(10, low=1)  # the run stops after this many skipped updates in a row
    # Also skip updates whose loss is this many standard deviations above its moving average.
    spike_sigma: float = number(0.0, low=0, zero="none")
    spike_window: int = number(100, low=2)  # updates in that average; nothing counts as a spike before that many
    # The longest waits: for the result of a step, for a batch, for a checkpoint, and from SIGTERM to the process's end.
    step_seconds: float = number(1800.0, low=0, high=LONGEST_WAIT, zero="for ever")
    data_seconds: float = number(1800.0, low=0, high=LONGEST_WAIT, zero="for ever")
    save_seconds: float = number(3600.0, low=0, high=LONGEST_WAIT, zero="for ever")
    stop_seconds: float = number(300.0, low=0, high=LONGEST_WAIT, zero="for ever")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    every: int = number(500, low=0, zero="only at the end")  # steps; also once at the end
    batches: int = number(50, low=0, zero="the whole split")  # validation batches per evaluation
    batch_size: int = number(0, low=0, zero="as many as a training microbatch")  # rows
    # Which held-out documents --mode=evaluate measures. During training they are always those of the validation split.
    split: Literal["validation", "test"] = "validation"
    sample_prompts: tuple[str, ...] = ("def fibonacci(n):\n", "import os\n\n\nclass ")
    sample_tokens: int = number(64, low=0, zero="no samples")
    sample_temperature: float = number(0.7, low=0, zero="greedy")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int = number(500, low=1)  # steps; also once at the end
    keep: int = number(3, low=1)  # number of newest steps that are kept, in addition to the best


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    tensorboard: bool = True  # CLU summaries; needs the [tensorboard] extra
    histograms_every: int = number(0, low=0, zero="none")  # steps between histograms of weights and gradients
    charts_every: int = number(500, low=0, zero="only at the end")  # steps between PNG charts; also once at the end
    wandb: Literal["off", "offline", "online"] = "off"
    profile_steps: str = ""  # FIRST:STOP: trace the steps FIRST to STOP - 1 into profile/ of the run; "": none


def profiled_steps(text: str) -> tuple[int, int] | None:
    """FIRST and STOP of `log.profile_steps`; None for "". Raises UserError where it is not FIRST:STOP."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise UserError(
            f"log.profile_steps={text!r}: expected FIRST:STOP with 1 <= FIRST < STOP, such as 20:23 for the steps 20, "
            "21 and 22"
        )
    return int(found[1]), int(found[2])
