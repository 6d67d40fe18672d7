"""Answers of the current policy to questions, and what the policy and its start make of their tokens.

The policy is the model at the temperature at which it is sampled, over all of its vocabulary, without dropout. Ids that
the generator never produces (padding, most special pieces) keep their share of the probability: a model that learned
anything gives them next to none.

Shapes: B rows, one answer each; T places of a row; X = B T tokens; D width; V vocabulary.
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
    """A prompt as ids, and what a reward has to know beside them: see `rl.questions`."""

    ids: tuple[int, ...]
    facts: Any = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The ids written behind a question, the ending one included. `ended`: there is one; else they were cut off."""

    question: Question
    token_ids: tuple[int, ...]
    ended: bool


class Pass(NamedTuple):
    """A forward pass of a policy. `scaled_XD` @ `unembed_VD`^T are its logits, the temperature included."""

    scaled_XD: Array
    unembed_VD: Array
    log_probs_X: Array  # of the targets that were written, elsewhere 0
    hidden: Hidden


def policy_pass(graph: Any, params: build.Params, batch: dict[str, Array], temperature: float) -> Pass:
    """The one that rollouts and training steps share."""
    module = build.bind(graph, build.model_params(params))
    hidden = module(batch["tokens"], batch["positions"], batch["segment_ids"])
    scaled_XD, unembed_VD = flat_tokens(hidden.states_BTD) / temperature, module.unembedding()
    losses = token_losses(scaled_XD, unembed_VD, flat_tokens(batch["targets"]))
    # Elsewhere, e to a difference from what is stored could be infinite.
    log_probs_X = jnp.where(flat_tokens(batch["loss_weights"]) > 0, -losses.nll_X, 0.0)
    return Pass(scaled_XD, unembed_VD, log_probs_X, hidden)


def critic_values(graph: Any, critic: build.Params, batch: dict[str, Array]) -> Array:
    """What a critic, a model with a `head`, expects at every token, [B, T]."""
    module = build.bind(graph, build.model_params(critic))
    hidden = module(batch["tokens"], batch["positions"], batch["segment_ids"])
    return head_scores(critic["head"], hidden.states_BTD)


def pack_answers(answers: Sequence[Answer], length: int, pad_id: int) -> Batch:
    """A batch of the training contract [B, T] with one answer in a row; weight 1 on what was written, 0 elsewhere."""
    rows = [[np.array(answer.question.ids + answer.token_ids, np.int32)] for answer in answers]
    batch = fill_batch(rows, len(rows), length, pad_id)
    for weights_T, answer in zip(batch["loss_weights"], answers, strict=True):
        weights_T[: len(answer.question.ids) - 1] = 0.0
    return batch


def fitting(questions: Sequence[Question], config: Config) -> list[Question]:
    """The questions that leave room for an answer, each once. Raises UserError where there are none."""
    room = config.train.sequence_length - config.rl.answer_tokens
    kept = list({question.ids: question for question in questions if len(question.ids) <= room}.values())
    if not kept:
        raise UserError(
            f"of {len(questions)} prompts none is at most train.sequence_length - rl.answer_tokens = {room} tokens "
            "long; raise the first or lower the second"
        )
    return kept


class RolloutEngine:
    """Draws answers, and computes what training needs to know of their tokens.

    `start`: the parameters of the model that the policy began as, unrolled; a copy is kept beside the policy, for the
    divergence from it. Policies are given in all their parts, in the layout of `compute.layers`, placed on a mesh.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, start: build.Params):
        self._config, self._tokenizer = config, tokenizer
        layout = {"model": build.to_layout(start, config.compute)}
        # By way of the host: a copy, since what the policy starts as is given away with its first step.
        self._start = jax.tree.map(np.array, layout)
        self._placed: _Placed | None = None

    def answer(self, params: build.Params, questions: Sequence[Question], *, samples: int, seed: int) -> list[Answer]:
        """`samples` answers of the policy to the first question, then to the second, and so on: drawn at
        `rl.temperature` from the whole vocabulary, of at most `rl.answer_tokens`."""
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
        """The answers packed, with `log_probs` under the policy, `reference` under its start, and `values` where it has
        a critic; each [B, T], 0 where the weight is.

        Answers of similar length are worked out together, in rows no longer than they need.
        """
        batch = pack_answers(answers, self._config.train.sequence_length, self._tokenizer.pad_id)
        placed, size = self._beside(params), self._config.train.microbatch_rows
        scores = {name: np.zeros_like(batch["loss_weights"]) for name in ("log_probs", "reference", "values")}
        lengths = np.count_nonzero(batch["segment_ids"], axis=1)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(answers), size):
            chosen = order[start : start + size]
            length = quarter(lengths[chosen[-1]], self._config.train.sequence_length)
            filled = np.resize(chosen, size)  # the last microbatch may want rows
            part = {name: array[filled, :length] for name, array in batch.items()}
            part = place_batch(batch_sharding(placed.mesh), part)
            found, of_start = jax.device_get((placed.score(params, part), placed.score(placed.start, part)))
            for name, array in {**found, "reference": of_start["log_probs"]}.items():
                scores[name][chosen, :length] = array[: len(chosen)]
        if "critic" not in params:
            del scores["values"]
        return {**batch, **scores}

    def start(self, params: build.Params) -> build.Params:
        """The model that the policy began as, `{"model": ...}`, placed as `params` are."""
        return self._beside(params).start

    def _beside(self, params: build.Params) -> _Placed:
        """The start on the mesh of a policy."""
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
    """The start of a policy on a mesh, and `make_score` compiled for that."""

    mesh: Mesh
    start: build.Params
    score: Callable[..., dict[str, Array]]


def make_score(config: Config) -> Callable[[build.Params, dict[str, Array]], dict[str, Array]]:
    """A function of parameters and a batch: `log_probs` of what was written and, with a critic, `values`."""
    graph = build.abstract_model(config.model, config.compute)[0]

    def score(params: build.Params, batch: dict[str, Array]) -> dict[str, Array]:
        made = policy_pass(graph, params, batch, config.rl.temperature)
        found = {"log_probs": made.log_probs_X.reshape(batch["targets"].shape)}
        if "critic" in params:
            found["values"] = critic_values(graph, params["critic"], batch) * batch["loss_weights"]
        return found

    return score
