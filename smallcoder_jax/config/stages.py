"""What is taught: the stages and the settings of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from smallcoder_jax.config.fields import Section, number


@dataclasses.dataclass(frozen=True)
class StageKind:
    """What a stage is like, for whoever would have to know it by name. A preflight knows the step of `next_token`, and
    of several stages in a row the next goes on from what one with `policy` trains."""

    reads: Literal["documents", "conversations", "preferences", "prompts"]
    needs: tuple[Literal["start", "teacher", "reward_model"], ...] = ()  # models of stages before it
    next_token: bool = False  # packed rows, and the loss of a language model: known without the data
    policy: bool = True
    head: bool = False  # a scalar head on the hidden states is trained: a reward
    critic: bool = False  # a second model with a scalar head is trained beside the first: values
    compares: bool = False  # answers to one question with each other
    adapters: bool = False  # may be all that is trained


KINDS: dict[str, StageKind] = {
    "pretrain": StageKind("documents", next_token=True),
    "sft": StageKind("conversations", ("start",), next_token=True, adapters=True),
    "distill": StageKind("documents", ("teacher",), policy=False),
    "reward": StageKind("preferences", ("start",), policy=False, head=True),
    "dpo": StageKind("preferences", ("start",), adapters=True),
    "ppo": StageKind("prompts", ("start", "reward_model"), critic=True),
    "grpo": StageKind("prompts", ("start",), compares=True, adapters=True),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a stage is judged by on held-out data: that it gets better (`better`, which way that is), and that it comes
    to no less than `least` and no more than `most`. Without any of these it is only shown. `error` names the standard
    error of the difference, where an evaluation knows it: better is then by more than the noise.
    """

    name: str
    better: Literal["", "higher", "lower"] = ""
    least: float | None = None
    most: float | None = None
    error: str = ""

    @classmethod
    def parsed(cls, text: str) -> Self:
        """From `NAME [higher|lower] [>=NUMBER] [<=NUMBER] [error=NAME]`. Raises ValueError that says what is wrong."""
        name, *words = text.split() or [""]
        found: dict[str, Any] = {}
        for word in words:
            if word in ("higher", "lower"):
                found["better"] = word
            elif word.startswith(">="):
                found["least"] = float(word[2:])
            elif word.startswith("<="):
                found["most"] = float(word[2:])
            elif word.startswith("error="):
                found["error"] = word[6:]
            else:
                raise ValueError(f"{word!r} is none of higher, lower, >=NUMBER, <=NUMBER, error=NAME")
        if not re.fullmatch(r"\w+", name):
            raise ValueError("it begins with the name of a measure")
        return cls(name, **found)


@dataclasses.dataclass(frozen=True)
class StageConfig(Section):
    """What a model is taught, and what it begins with. Every stage has a file in `stages/`."""

    name: Literal["pretrain", "sft", "distill", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    start: str = ""  # run or export whose parameters are the first, with a fresh optimizer; "": they are drawn
    # By which a pipeline of stages judges this one, each as `NAME [higher|lower] [>=NUMBER] [<=NUMBER] [error=NAME]`.
    measures: tuple[str, ...] = ()

    @property
    def kind(self) -> StageKind:
        return KINDS[self.name]

    def problems(self) -> Iterator[str]:
        for measure in self.measures:
            try:
                Measure.parsed(measure)
            except ValueError as error:
                yield f"stage.measures has {measure!r}: {error}"


@dataclasses.dataclass(frozen=True)
class DistillConfig(Section):
    """What a student learns from a teacher, beside the text: alpha CE + (1 - alpha) T^2 KL(teacher || student)."""

    teacher: str = ""  # a run or an export with the same tokenizer
    alpha: float = number(0.5, low=0, high=1)
    temperature: float = number(2.0, above=0)
    # Likeliest tokens of the teacher, worked out once and kept. Without, it runs beside.
    top_k: int = number(0, low=0, zero="the whole vocabulary")


@dataclasses.dataclass(frozen=True)
class DpoConfig(Section):
    # How much an answer's log-probability, less that at the start, is worth (arXiv 2305.18290).
    beta: float = number(0.1, above=0)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) in the stages sft, dpo and grpo: they alone are trained, beside the model of
    `stage.start`, which stays as it is.
    """

    rank: int = number(0, low=0, zero="no adapters: all parameters are trained")
    alpha: float = number(16.0, above=0)  # what adapters add to a kernel is alpha / rank times their product
    pattern: str = r"(attention|mlp)/.*kernel"  # kernels that get adapters, by their path in a block


@dataclasses.dataclass(frozen=True)
class RLConfig(Section):
    """Stages ppo and grpo: what is asked, how answers are drawn, what they are worth, and what is learned from them.

    One iteration is `questions` x `group_size` answers, gone through `inner_epochs` times in batches of
    `train.batch_size`.
    """

    prompts: Literal["conversations", "code"] = "conversations"  # turns that call functions; functions without a body
    prompt_count: int = number(4000, low=1)  # conversations or calls that prompts are made of; a tenth is held out
    reward_model: str = ""  # run folder of the stage reward; "": answers are checked, where it takes that by running
    questions: int = number(8, low=1)  # of an iteration
    group_size: int = number(8, low=1)  # answers to each question; grpo compares these
    answer_tokens: int = number(128, low=1)  # the longest answer
    eval_answers: int = number(1, low=1)  # to each held-out prompt in an evaluation
    temperature: float = number(0.8, above=0)  # at which answers are drawn, and of the policy that is trained
    inner_epochs: int = number(4, low=1)
    clip: float = number(0.2, above=0)  # of the ratio of probabilities
    value_clip: float = number(0.2, above=0)  # ppo: of values
    value_weight: float = number(0.5, low=0)  # ppo: of the value loss
    entropy_weight: float = number(0.01, low=0)  # ppo: of the entropy bonus
    kl_coefficient: float = number(0.02, low=0)  # of the divergence from the start
    # Nats per answer to which the coefficient is adapted.
    kl_target: float = number(0.0, low=0, zero="a fixed coefficient")
    gamma: float = number(0.99, low=0, high=1)  # ppo: discount per token
    gae_lambda: float = number(0.95, low=0, high=1)  # ppo
    value_warmup: int = number(0, low=0)  # ppo: iterations at the start from which values alone are learned
    # Of what a checked answer earns: the share that text beside its calls, or behind its body, costs.
    surplus_price: float = number(0.1, low=0, high=1)
    # Off the reward of an answer without an end; a checked turn without one earns nothing.
    cut_off_price: float = number(0.5, low=0)
    mask_cut_off: bool = False  # an answer without an end is made neither likelier nor less likely; teaches no values
    # grpo: a group's rewards are divided by no smaller deviation than this, so that noise is no difference.
    smallest_deviation: float = number(0.05, above=0)
