"""Rollouts: answers of the current policy to questions, with the log-probabilities of their tokens under the policy and
under the start model.

The policy is the model's distribution over the whole vocabulary at the sampling temperature, without dropout. Ids that
the generator never produces (padding, most special pieces) keep their probability, which is almost 0 in a trained
model.

Shapes: B rows, one answer each; T positions of a row; X = B T tokens; D width; V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.lengths import quarter
from smallcoder_jax.config import Config
from smallcoder_jax.data.rows.packing import fill_batch
from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.mesh import batch_sharding, flat_tokens, on_mesh, params_sharding, place_batch
from smallcoder_jax.models import build
from smallcoder_jax.models.families import family_of
from smallcoder_jax.models.family import Hidden
from smallcoder_jax.models.heads import head_scores
from smallcoder_jax.ops import precision
from smallcoder_jax.ops.cross_entropy import token_losses
from smallcoder_jax.tokenizers.base import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as ids, and the facts that a reward needs in addition (see `rl.questions`)."""

    ids: tuple[int, ...]
    facts: Any = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The ids generated after a question, including the end token. `ended` is false for an answer that was cut off."""

    question: Question
    token_ids: tuple[int, ...]
    ended: bool


class Pass(NamedTuple):
    """A forward pass of a policy. `scaled_XD` @ `unembed_VD`^T are the logits divided by the temperature."""

    scaled_XD: Array
    unembed_VD: Array
    log_probs_X: Array  # of the answer's tokens; 0 elsewhere
    hidden: Hidden


def policy_pass(graph: Any, params: build.Params, batch: dict[str, Array], temperature: float) -> Pass:
    """Computes the forward pass. Rollouts and training steps share it."""
    module = build.bind(graph, build.model_params(params))
    hidden = module(batch["tokens"], batch["positions"], batch["segment_ids"])
    scaled_XD, unembed_VD = flat_tokens(hidden.states_BTD) / temperature, module.unembedding()
    losses = token_losses(scaled_XD, unembed_VD, flat_tokens(batch["targets"]))
    # Outside answers, the exponential of a difference from the stored value could be infinite.
    log_probs_X = jnp.where(flat_tokens(batch["loss_weights"]) > 0, -losses.nll_X, 0.0)
    return Pass(scaled_XD, unembed_VD, log_probs_X, hidden)


def critic_values(graph: Any, critic: build.Params, batch: dict[str, Array]) -> Array:
    """The values [B, T] that a critic, a model with a `head`, predicts at every token."""
    module = build.bind(graph, build.model_params(critic))
    hidden = module(batch["tokens"], batch["positions"], batch["segment_ids"])
    return head_scores(critic["head"], hidden.states_BTD)


def pack_answers(answers: Sequence[Answer], length: int, pad_id: int) -> Batch:
    """A training batch [B, T] with one answer per row. Weights are 1 on the answer's tokens and 0 elsewhere."""
    rows = [[np.array(answer.question.ids + answer.token_ids, np.int32)] for answer in answers]
    batch = fill_batch(rows, len(rows), length, pad_id)
    for weights_T, answer in zip(batch["loss_weights"], answers, strict=True):
        weights_T[: len(answer.question.ids) - 1] = 0.0
    return batch


def fitting(questions: Sequence[Question], config: Config) -> list[Question]:
    """The questions that leave room for an answer, without duplicates. Raises UserError when there are none."""
    room = config.train.sequence_length - config.rl.answer_tokens
    kept = list({question.ids: question for question in questions if len(question.ids) <= room}.values())
    if not kept:
        raise UserError(
            f"none of {len(questions)} prompts is at most train.sequence_length - rl.answer_tokens = {room} tokens "
            "long; raise train.sequence_length or lower rl.answer_tokens"
        )
    return kept


class RolloutEngine:
    """Samples answers, and computes the log-probabilities and values of their tokens that training needs.

    `start` holds the unrolled parameters of the start model. A copy is kept to compute the policy's divergence from it.
    Policies are given with all their parts, in the layout of `compute.layers`, placed on a mesh.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, start: build.Params):
        self._config, self._tokenizer = config, tokenizer
        layout = {"model": build.to_layout(start, config.compute)}
        # Copied to the host, because the first training step donates the parameters that the policy starts with.
        self._start = jax.tree.map(np.array, layout)
        self._placed: _Placed | None = None

    def answer(self, params: build.Params, questions: Sequence[Question], *, samples: int, seed: int) -> list[Answer]:
        """`samples` answers of the policy to each question, in the order of the questions.

        They are sampled at `rl.temperature` from the whole vocabulary and have at most `rl.answer_tokens` tokens.
        """
        rl = self._config.rl
        options = SamplingOptions(
            max_tokens=rl.answer_tokens, temperature=rl.temperature, top_k=0, top_p=1.0, seed=seed, num_samples=samples
        )
        model = build.to_unrolled(build.model_params(params))
        generator = Generator(self._config.model, self._config.compute, model, self._tokenizer)
        written = generator.generate([question.ids for question in questions], options, self._config.train.batch_size)
        asked = [question for question in questions for _ in range(samples)]
        return [
            Answer(question, completion.token_ids, completion.finish_reason == "stop")
            for question, completion in zip(asked, written, strict=True)
        ]

    def rows(self, params: build.Params, answers: Sequence[Answer]) -> Batch:
        """The packed answers, with the `log_probs` of their tokens under the policy, those under the start model as
        `reference` and, for a policy with a critic, `values`.

        Each is [B, T], and 0 where the weight is 0. Answers of similar length are computed together, in rows only as
        long as they need.
        """
        batch = pack_answers(answers, self._config.train.sequence_length, self._tokenizer.pad_id)
        placed, size = self._placed_start(params), self._config.train.microbatch_rows
        scores = {name: np.zeros_like(batch["loss_weights"]) for name in ("log_probs", "reference", "values")}
        lengths = np.count_nonzero(batch["segment_ids"], axis=1)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(answers), size):
            chosen = order[start : start + size]
            length = quarter(lengths[chosen[-1]], self._config.train.sequence_length)
            filled = np.resize(chosen, size)  # the last microbatch may not be full
            part = {name: array[filled, :length] for name, array in batch.items()}
            part = place_batch(batch_sharding(placed.mesh), part)
            found, of_start = jax.device_get((placed.score(params, part), placed.score(placed.start, part)))
            for name, array in {**found, "reference": of_start["log_probs"]}.items():
                scores[name][chosen, :length] = array[: len(chosen)]
        if "critic" not in params:
            del scores["values"]
        return {**batch, **scores}

    def start(self, params: build.Params) -> build.Params:
        """The parameters of the start model, `{"model": ...}`, on the mesh of `params`."""
        return self._placed_start(params).start

    def _placed_start(self, params: build.Params) -> _Placed:
        """The start model on the mesh of a policy."""
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        if self._placed is None or self._placed.mesh != mesh:
            start = jax.device_put(
                self._start, params_sharding(mesh, self._start, family_of(self._config.model).sharding)
            )
            matmul = precision.choose(self._config.compute, mesh.devices.flat[0].platform)
            score = precision.multiplying(matmul.kind, make_score(self._config))
            self._placed = _Placed(mesh, start, jax.jit(on_mesh(mesh, score)))
        return self._placed


class _Placed(NamedTuple):
    """The start model on a mesh, and `make_score` compiled for that mesh."""

    mesh: Mesh
    start: build.Params
    score: Callable[..., dict[str, Array]]


def make_score(config: Config) -> Callable[[build.Params, dict[str, Array]], dict[str, Array]]:
    """A function that maps parameters and a batch to the `log_probs` of the answers and, with a critic, `values`."""
    graph = build.abstract_model(config.model, config.compute)[0]

    def score(params: build.Params, batch: dict[str, Array]) -> dict[str, Array]:
        made = policy_pass(graph, params, batch, config.rl.temperature)
        found = {"log_probs": made.log_probs_X.reshape(batch["targets"].shape)}
        if "critic" in params:
            found["values"] = critic_values(graph, params["critic"], batch) * batch["loss_weights"]
        return found

    return score
