"""The task and the measures of stages that learn from their own answers (PPO and GRPO).

Shapes: B rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from smallcoder_jax import loading
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.mesh import make_mesh, params_sharding
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.rl import questions
from smallcoder_jax.rl.experience import REPORTED, Experience, Learn, grpo_rows
from smallcoder_jax.rl.rewards import VERSION, CheckedReward, Reward, RewardModel
from smallcoder_jax.rl.rollouts import Question, RolloutEngine, fitting
from smallcoder_jax.sandbox import run as sandbox
from smallcoder_jax.stages.shared.start import load_start, need_start, one_process, start_of
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.sums import add_up, ratio
from smallcoder_jax.train.task import Evaluation, Task

_MEASURES = ("reward", "gain", "start_kl", "answer_tokens", "ended")
_COMPARED_WITH_START = ("gain", "gain_error", "start_kl")
_SHOWN = 2  # held-out prompts that are sampled during training


def iteration_sums(batch: Batch, weight: Array) -> dict[str, Array]:
    """The statistics of an iteration's answers, which are the same in all rows, as sums over `weight`."""
    return {name: jnp.mean(batch[name]) * weight for name in REPORTED}


@dataclasses.dataclass(frozen=True)
class PolicyTask(Task):
    """A task that is evaluated by its answers to held-out questions, not by the loss of batches."""

    experience: Experience = dataclasses.field(kw_only=True)
    held_out: Sequence[Question] = dataclasses.field(kw_only=True)

    def evaluate(self, evaluation: Evaluation) -> dict[str, float] | None:
        """See `summarise`."""
        self.experience.on_params(evaluation.params)
        found = self.experience.evaluation(
            self.held_out, evaluation.limit, len(evaluation.rows), beside_start=not evaluation.loss_alone
        )
        sums = evaluation.add(map(evaluation_sums, evaluation.drawn(found)))
        return None if sums is None else summarise(sums)


def evaluation_sums(batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The sums over the questions of a batch of `Experience.evaluation`, and their number as `weight`."""
    counted_B1 = batch["counted"]
    sums = {name: float(np.sum(batch[name] * counted_B1)) for name in _MEASURES}
    sums["gain_square"] = float(np.sum(batch["gain"] ** 2 * counted_B1))
    return {**sums, "weight": float(np.sum(counted_B1))}


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means over held-out questions.

    `reward`; `loss`, which is the negative reward; `gain`, the reward minus the start model's, with its standard error
    `gain_error`; `start_kl` in nats per answer; `answer_tokens`; and `ended`, the share of answers that ended.
    """
    means = {name: ratio(sums[name], sums["weight"]) for name in _MEASURES}
    variance = max(ratio(sums["gain_square"], sums["weight"]) - means["gain"] ** 2, 0.0)
    return {"loss": -means["reward"], **means, "gain_error": math.sqrt(ratio(variance, sums["weight"] - 1))}


def make_task(
    config: Config, loaded: LoadedModel | None, *, loss_fn: LossFn, learn: Learn, reported: tuple[str, ...]
) -> Task:
    """The task of a stage whose batches are its policy's own answers. `learn` computes from them what the loss needs.

    Raises UserError when there is no start model, when code cannot be isolated, and when settings contradict each
    other.
    """
    loaded, rl = need_start(config, loaded), config.rl
    one_process(config)
    tokenizer = loaded.tokenizer
    _mesh(config)  # raises for a mesh that splits rows
    asked = {side: _ask(config, tokenizer, side) for side in SPLITS}
    reward, judge = _make_reward(config, tokenizer)
    engine = RolloutEngine(config, tokenizer, loaded.params)
    experience = Experience(config, engine, asked["train"], reward, learn)

    digest = hashlib.sha256(repr([[question.ids for question in asked[side]] for side in asked]).encode())
    return PolicyTask(
        loss_fn=loss_fn,
        summarise=summarise,
        train_batches=lambda rows: experience,
        validation_batches=lambda limit, rows: iter(()),
        experience=experience,
        held_out=asked["validation"],
        identity={
            "prompts": digest.hexdigest(),
            "tokenizer": tokenizer.hash,
            "judge": judge,
            # A reward model is `judge`, wherever it is.
            "rl": {name: value for name, value in dataclasses.asdict(rl).items() if name != "reward_model"},
            "sequence_length": config.train.sequence_length,
            "batch_size": config.train.batch_size,
            "seed": config.train.seed,
        },
        tokenizer=tokenizer,
        dataset=f"its own answers to prompts of {rl.prompts}",
        dummy_data=False,
        facts={
            "prompts": f"{rl.prompts}: {len(asked['train']):,} to train on, {len(asked['validation']):,} held out",
            "iteration": f"{rl.questions} x {rl.group_size} answers of at most {rl.answer_tokens} tokens, at "
            f"temperature {rl.temperature}; trained on for {rl.inner_epochs} epochs",
            "reward": rl.reward_model or "checked answers",
        },
        accounting={"prompts": {side: len(asked[side]) for side in asked}},
        reported=(*reported, *REPORTED),
        start=start_of(loaded),
        prompts={tokenizer.decode(list(question.ids)): question.ids for question in asked["validation"][:_SHOWN]},
        on_params=experience.on_params,
    )


def measure(config: Config, loaded: LoadedModel) -> dict[str, Any]:
    """The measures (`summarise`) of a model's answers to the first `eval.batches` x rows held-out prompts.

    They are compared with the model of `stage.start`, if it is given. A single prompt has no standard error.
    """
    mesh, tokenizer = _mesh(config), loaded.tokenizer
    reward, _ = _make_reward(config, tokenizer)
    start = load_start(config)
    engine = RolloutEngine(config, tokenizer, start.params if start else loaded.params)
    asked = _ask(config, tokenizer, "validation")
    experience = Experience(config, engine, asked, reward, grpo_rows)
    params = {"model": build.to_layout(loaded.params, config.compute)}
    experience.on_params(jax.device_put(params, params_sharding(mesh, params, family_of(config.model).sharding)))
    batches = experience.evaluation(asked, config.eval.batches, eval_rows(config), beside_start=start is not None)
    total = add_up(map(evaluation_sums, batches)) or {}
    found = summarise(total)
    if total["weight"] == 1:
        del found["gain_error"]
    return {name: value for name, value in found.items() if start or name not in _COMPARED_WITH_START}


def _mesh(config: Config) -> Mesh:
    mesh = make_mesh(config.mesh, config.model, config.train.microbatch_rows)
    if mesh.shape["context"] > 1:
        raise UserError(f"{config.mesh.context=}: stage.name={config.stage.name} cannot split rows; set it to 1")
    return mesh


def _ask(config: Config, tokenizer: Tokenizer, side: str) -> list[Question]:
    """The questions of `rl.prompts` on one side of the split that fit a row."""
    rl = config.rl
    if rl.prompts == "code":
        found = questions.from_code(tokenizer, side=side, draws=rl.prompt_count)
    else:
        found = questions.from_conversations(
            tokenizer, side=side, count=rl.prompt_count, seed=config.dialogs.seed, most_tokens=rl.answer_tokens
        )
    return fitting(found, config)


def _make_reward(config: Config, tokenizer: Tokenizer) -> tuple[Reward, str]:
    """The reward of the config, and a text that identifies it."""
    if not config.rl.reward_model:
        sandbox.check_isolation()
        return CheckedReward(tokenizer, config.rl), f"checked, version {VERSION}"
    loaded = loading.load(Path(config.rl.reward_model))
    rows = config.train.microbatch_rows
    return RewardModel(loaded, tokenizer, rows, config.rl.cut_off_price), loaded.origin["hash"]
