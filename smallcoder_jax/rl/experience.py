"""Minibatches of experience: answers of the current policy with rewards and advantages, used for several epochs.

Shapes: N answers of an iteration, B rows of a minibatch, T positions of a row.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from smallcoder_jax import losses
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, RLConfig
from smallcoder_jax.rl.rewards import Reward
from smallcoder_jax.rl.rollouts import Answer, Batch, Question, RolloutEngine

# Statistics of an iteration's answers for the log. All rows of an iteration have the same values.
REPORTED = ("reward", "start_kl", "answer_tokens", "ended", "kl_coefficient")
_QUESTIONS, _DRAWS, _ROWS = range(3)  # streams of random numbers
ADAPTIVE_STEP, LARGEST_ERROR = 0.1, 0.2  # of the KL coefficient's update (arXiv 1909.08593, section 2.2)

# (config, rows of an iteration, its rewards [N], the KL coefficient) -> the rows, with the columns that the stage's
# loss needs added
Learn = Callable[[RLConfig, Batch, np.ndarray, float], Batch]


def ppo_rows(rl: RLConfig, rows: Batch, rewards_N: np.ndarray, kl_coefficient: float) -> Batch:
    """Adds `advantages` and `returns` [N, T], computed by GAE.

    The reward is added at the last token. Every token has a penalty: the KL coefficient times the difference between
    the policy's and the start model's log-probability. Advantages are normalised to mean 0 and standard deviation 1
    over all tokens.
    """
    real_NT = rows["loss_weights"] > 0
    rewards_NT = -kl_coefficient * (rows["log_probs"] - rows["reference"])
    last_N = real_NT.shape[1] - 1 - np.argmax(real_NT[:, ::-1], axis=1)
    rewards_NT[np.arange(len(last_N)), last_N] += rewards_N
    given = jax.device_put((rewards_NT.astype(np.float32), rows["values"], real_NT))
    advantages_NT, returns_NT = jax.device_get(_generalized_advantages(*given, rl.gamma, rl.gae_lambda))
    of_real = advantages_NT[real_NT]
    advantages_NT = np.where(real_NT, (advantages_NT - of_real.mean()) / (of_real.std() + 1e-8), 0.0)
    return {**rows, "advantages": advantages_NT.astype(np.float32), "returns": returns_NT}


_generalized_advantages = jax.jit(
    lambda rewards_NT, values_NT, real_NT, gamma, decay: losses.generalized_advantages(
        rewards_NT, values_NT, real_NT, gamma=gamma, decay=decay
    ),
    static_argnums=(3, 4),
)


def grpo_rows(rl: RLConfig, rows: Batch, rewards_N: np.ndarray, kl_coefficient: float) -> Batch:
    """Adds `advantages` [N, 1], each relative to the other answers to the same question, and `alike_groups` [N, 1].

    `alike_groups` is for the log: the share of questions whose answers all have the same reward, which teach nothing.
    The divergence from the start model is part of the loss, so `kl_coefficient` is not used.
    """
    del kl_coefficient
    rewards_BG = rewards_N.reshape(-1, rl.group_size)
    advantages_BG = jax.device_get(_group_advantages(jax.device_put(rewards_BG), rl.smallest_deviation))
    alike = np.mean(np.ptp(rewards_BG, axis=1) == 0)
    return {
        **rows,
        "advantages": advantages_BG.reshape(-1, 1),
        "alike_groups": np.full((len(rewards_N), 1), alike, np.float32),
    }


_group_advantages = jax.jit(
    lambda rewards_BG, deviation: losses.group_advantages(rewards_BG, smallest_deviation=deviation), static_argnums=1
)


def statistics(rows: Batch, answers: Sequence[Answer], rewards_N: np.ndarray) -> Batch:
    """Statistics of every answer, each [N, 1].

    `reward`; `start_kl`, the divergence of the policy from the start model over the answer, in nats, estimated as in
    `losses.reference_divergence`; `answer_tokens`; and `ended`, 1 or 0.
    """
    difference_NT = rows["reference"] - rows["log_probs"]
    columns = {
        "reward": rewards_N,
        "start_kl": np.sum(np.expm1(difference_NT) - difference_NT, axis=1),
        "answer_tokens": rows["loss_weights"].sum(axis=1),
        "ended": [answer.ended for answer in answers],
    }
    return {name: np.asarray(column, np.float32)[:, None] for name, column in columns.items()}


class Experience:
    """Endless minibatches of `train.batch_size` rows.

    An iteration samples answers to `rl.questions` questions from the policy last given to `on_params`, and then yields
    `rl.inner_epochs` shuffled epochs over them. The order of the questions changes in every epoch over the questions.
    Answers depend on the seed, the iteration and the policy. The state holds the answers of an unfinished iteration and
    everything computed for them, so that a run that stopped in the middle of one continues exactly.
    """

    def __init__(
        self, config: Config, engine: RolloutEngine, questions: Sequence[Question], reward: Reward, learn: Learn
    ):
        if len(questions) < config.rl.questions:
            raise UserError(
                f"there are {len(questions)} different prompts to train on, but {config.rl.questions=} are asked in an "
                "iteration; lower it, or give more"
            )
        self._config, self._engine, self._questions = config, engine, questions
        self._reward, self._learn = reward, learn
        self._iteration, self._taken = 0, 0  # iterations begun, minibatches taken from the newest
        self._kl_coefficient = config.rl.kl_coefficient  # of the next iteration
        self._rows: Batch | None = None
        self._written = ""  # the rows as text
        self._params: Any = None
        self._start_rewards: dict[int, np.ndarray] = {}  # of the start model, by the number of held-out questions

    def on_params(self, params: Any) -> None:
        """Sets the policy that gives the answers from now on."""
        self._params = params

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rl, size = self._config.rl, self._config.train.batch_size
        total = rl.questions * rl.group_size
        if self._rows is None:
            self._rows = self._roll_out()
            self._written = _to_text(self._rows)
            self._taken = 0
        epoch, start = divmod(self._taken * size, total)
        order = np.random.default_rng((self._config.train.seed, _ROWS, self._iteration, epoch)).permutation(total)
        chosen = order[start : start + size]
        batch = {name: array[chosen] for name, array in self._rows.items()}
        self._taken += 1
        if self._taken * size == rl.inner_epochs * total:
            self._rows, self._written = None, ""
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state after the minibatch returned last, JSON-serialisable. `rows` holds the arrays of the iteration as
        compressed text, and is empty between iterations.
        """
        return {
            "iteration": self._iteration,
            "taken": self._taken,
            "kl_coefficient": self._kl_coefficient,
            "rows": self._written,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state that `get_state` returned for the same questions and settings."""
        self._iteration, self._taken = state["iteration"], state["taken"]
        self._kl_coefficient, self._written = state["kl_coefficient"], state["rows"]
        self._rows = _from_text(self._written) if self._written else None

    def close(self) -> None:
        """Nothing runs in the background."""

    def evaluation(
        self, questions: Sequence[Question], limit: int, rows: int, *, beside_start: bool = True
    ) -> Iterator[Batch]:
        """Evaluates the policy on the first `limit` batches of `rows` questions (0: all). Yields columns [rows, 1].

        Each question gets `rl.eval_answers` answers, sampled with the same random numbers in every evaluation. The
        columns are the means of `statistics` over them; `gain`, the reward minus the reward of as many answers of the
        start model, or 0 without `beside_start`; and `counted`, 1 for a question and 0 for padding.
        """
        asked = list(questions[: limit * rows] if limit else questions)
        each, missing = self._config.rl.eval_answers, -len(asked) % rows
        answers = self._held_out(self._params, asked)
        rewards = self._reward(answers)
        policy = {name: part for name, part in self._params.items() if name != "critic"}  # values are not needed
        scored = self._engine.rows(policy, answers)
        theirs = rewards
        if beside_start:
            if len(asked) not in self._start_rewards:
                is_start = np.array_equal(scored["log_probs"], scored["reference"])
                found = rewards if is_start else self._reward(self._held_out(self._engine.start(policy), asked))
                self._start_rewards[len(asked)] = found
            theirs = self._start_rewards[len(asked)]
        columns = statistics(scored, answers, rewards) | {"gain": (rewards - theirs)[:, None]}
        columns["counted"] = np.ones_like(columns["reward"])
        found = {name: column.reshape(-1, each).mean(axis=1)[:, None] for name, column in columns.items()}
        padded = {name: np.pad(column, ((0, missing), (0, 0))) for name, column in found.items()}
        for start in range(0, len(asked), rows):
            yield {name: column[start : start + rows] for name, column in padded.items()}

    def _held_out(self, params: Any, asked: Sequence[Question]) -> list[Answer]:
        rl, seed = self._config.rl, self._config.train.seed
        return self._engine.answer(params, asked, samples=rl.eval_answers, seed=seed)

    def _roll_out(self) -> Batch:
        """Begins an iteration: samples answers of the policy and computes everything that the loss needs."""
        rl, seed = self._config.rl, self._config.train.seed
        chosen = [self._questions[i] for i in _chosen(len(self._questions), rl.questions, self._iteration, seed)]
        self._iteration += 1
        draw = int(np.random.default_rng((seed, _DRAWS, self._iteration)).integers(2**32))
        answers = self._engine.answer(self._params, chosen, samples=rl.group_size, seed=draw)
        rewards_N = self._reward(answers)
        rows = self._engine.rows(self._params, answers)
        known = statistics(rows, answers, rewards_N)
        known["kl_coefficient"] = np.full_like(known["reward"], self._kl_coefficient)
        rows = self._learn(rl, rows, rewards_N, self._kl_coefficient)
        if self._iteration <= rl.value_warmup:
            rows["advantages"] = np.zeros_like(rows["advantages"])
        if rl.mask_cut_off:
            cut_N = np.array([not answer.ended for answer in answers])
            rows["advantages"] = np.where(cut_N[:, None], np.float32(0.0), rows["advantages"])
            if "returns" in rows:
                rows["returns"] = np.where(cut_N[:, None], rows["values"], rows["returns"])
        self._kl_coefficient = next_coefficient(rl, self._kl_coefficient, float(known["start_kl"].mean()))
        return {**rows, **{name: np.full_like(column, column.mean()) for name, column in known.items()}}


def next_coefficient(rl: RLConfig, coefficient: float, kl: float) -> float:
    """The KL coefficient after an iteration whose answers diverged from the start model by `kl` nats on average.

    It grows when `kl` was above `rl.kl_target` and shrinks when it was below. Without a target it does not change.
    """
    if not rl.kl_target:
        return coefficient
    error = min(max(kl / rl.kl_target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1.0 + ADAPTIVE_STEP * error)


def _chosen(count: int, wanted: int, iteration: int, seed: int) -> list[int]:
    """The indices of the questions that an iteration asks: the next items of an endless series of shuffled epochs."""
    places = range(iteration * wanted, (iteration + 1) * wanted)
    orders = {
        epoch: np.random.default_rng((seed, _QUESTIONS, epoch)).permutation(count)
        for epoch in range(places[0] // count, places[-1] // count + 1)
    }
    return [int(orders[place // count][place % count]) for place in places]


def _to_text(rows: Batch) -> str:
    file, arrays = io.BytesIO(), dict[str, Any](rows)
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _from_text(text: str) -> Batch:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        return dict(arrays)
