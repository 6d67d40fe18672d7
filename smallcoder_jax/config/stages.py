"""What is taught: the stages and the settings of each."""

from __future__ import annotations

import dataclasses
from typing import Literal

from smallcoder_jax.config.fields import Section, number


@dataclasses.dataclass(frozen=True)
class StageConfig(Section):
    """What a model is taught, and what it begins with. Every stage has a file in `stages/`."""

    name: Literal["pretrain", "sft", "distill", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    start: str = ""  # run or export whose parameters are the first, with a fresh optimizer; "": they are drawn

    @property
    def has_head(self) -> bool:
        """Whether a scalar head on the hidden states is trained: a reward."""
        return self.name == "reward"

    @property
    def has_critic(self) -> bool:
        """Whether a second decoder with a scalar head is trained beside the first: values."""
        return self.name == "ppo"


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
