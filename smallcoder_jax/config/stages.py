"""The training stages and the settings of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from smallcoder_jax.config.fields import Section, number


@dataclasses.dataclass(frozen=True)
class StageKind:
    """The properties of a stage, so that other code does not depend on the stage's name."""

    reads: Literal["documents", "conversations", "preferences", "prompts"]
    needs: tuple[Literal["start", "teacher", "reward_model"], ...] = ()  # models from earlier stages
    next_token: bool = False  # trains on packed rows with a language model's loss: a preflight knows its step
    policy: bool = True  # trains the model that the next stage of a pipeline starts from
    head: bool = False  # trains a scalar head on the hidden states, which computes a reward
    critic: bool = False  # also trains a second model with a scalar head, which computes values
    compares: bool = False  # compares the answers to one question with each other
    adapters: bool = False  # can train low-rank adapters only


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
    """A measure on held-out data by which a stage is judged: it has to improve in the direction `better`, to be at
    least `least` and at most `most`. Without any of these it is only shown. `error` names the standard error of the
    improvement, where an evaluation reports it; the improvement then has to exceed the noise.
    """

    name: str
    better: Literal["", "higher", "lower"] = ""
    least: float | None = None
    most: float | None = None
    error: str = ""

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Parses `NAME [higher|lower] [>=NUMBER] [<=NUMBER] [error=NAME]`. Raises ValueError that names the mistake."""
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
    """The stage that a run trains, and the model that it starts from. Every stage has a file in `stages/`."""

    name: Literal["pretrain", "sft", "distill", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    # Run or export whose parameters training starts from, with a fresh optimizer; "": random parameters.
    start: str = ""
    # Measures by which a pipeline judges this stage, each `NAME [higher|lower] [>=NUMBER] [<=NUMBER] [error=NAME]`.
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
    """The loss of a student that learns from a teacher and from the text: alpha CE + (1 - alpha) T^2 KL(teacher ||
    student)."""

    teacher: str = ""  # a run or an export with the same tokenizer
    alpha: float = number(0.5, low=0, high=1)
    temperature: float = number(2.0, above=0)
    # How many of the teacher's top tokens are computed and stored beforehand. With 0 the teacher runs during training.
    top_k: int = number(0, low=0, zero="the whole vocabulary")


@dataclasses.dataclass(frozen=True)
class DpoConfig(Section):
    # Scale of the implicit reward: beta times an answer's log-probability minus the start model's (arXiv 2305.18290).
    beta: float = number(0.1, above=0)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) for the stages sft, dpo and grpo. Only the adapters are trained; the model
    of `stage.start` does not change.
    """

    rank: int = number(0, low=0, zero="no adapters: all parameters are trained")
    alpha: float = number(16.0, above=0)  # adapters add alpha / rank times their product to a kernel
    pattern: str = r"(attention|mlp)/.*kernel"  # kernels that get adapters, by their path in a block


@dataclasses.dataclass(frozen=True)
class RLConfig(Section):
    """Stages ppo and grpo: the prompts, the sampling of answers, their rewards and the policy update.

    One iteration samples `questions` x `group_size` answers and trains on them for `inner_epochs` epochs in batches of
    `train.batch_size`.
    """

    prompts: Literal["conversations", "code"] = "conversations"  # turns that call functions; functions without a body
    prompt_count: int = number(4000, low=1)  # conversations or calls from which prompts are made; a tenth is held out
    reward_model: str = ""  # run folder of the stage reward; "": answers are checked, if necessary by running them
    questions: int = number(8, low=1)  # per iteration
    group_size: int = number(8, low=1)  # answers to each question; grpo compares these
    answer_tokens: int = number(128, low=1)  # the longest answer
    eval_answers: int = number(1, low=1)  # answers to each held-out prompt in an evaluation
    temperature: float = number(0.8, above=0)  # of sampling, and of the policy that is trained
    inner_epochs: int = number(4, low=1)
    clip: float = number(0.2, above=0)  # range of the ratio of probabilities around 1
    value_clip: float = number(0.2, above=0)  # ppo: range of a value around the old one
    value_weight: float = number(0.5, low=0)  # ppo: weight of the value loss
    entropy_weight: float = number(0.01, low=0)  # ppo: weight of the entropy bonus
    kl_coefficient: float = number(0.02, low=0)  # weight of the divergence from the start model
    # Divergence in nats per answer; the coefficient is adapted to reach it.
    kl_target: float = number(0.0, low=0, zero="a fixed coefficient")
    gamma: float = number(0.99, low=0, high=1)  # ppo: discount per token
    gae_lambda: float = number(0.95, low=0, high=1)  # ppo
    value_warmup: int = number(0, low=0)  # ppo: iterations at the start that train only the values
    # The share of a checked answer's reward that is deducted for text around its calls or after its body.
    surplus_price: float = number(0.1, low=0, high=1)
    # Deducted from the reward of an answer that does not end; a checked turn that does not end has reward 0.
    cut_off_price: float = number(0.5, low=0)
    mask_cut_off: bool = False  # exclude answers that do not end from the losses of policy and values
    # grpo: a group's rewards are divided by at least this deviation, so that noise does not count as a difference.
    smallest_deviation: float = number(0.05, above=0)
