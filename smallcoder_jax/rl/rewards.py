"""Rewards of answers: by a reward model, by checking function calls, or by running code.

A reward is a function that maps answers to one number each.

Shapes: N answers; B rows, T positions of a row.
"""

from __future__ import annotations

import concurrent.futures
import difflib
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.lengths import bucket
from smallcoder_jax.config import RLConfig
from smallcoder_jax.evaluate.tool_calls import call_levels
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build
from smallcoder_jax.models.heads import scores_at
from smallcoder_jax.rl.bodies import CACHED, LIMITS, share_right, split_body
from smallcoder_jax.rl.questions import Turn
from smallcoder_jax.rl.rollouts import Answer
from smallcoder_jax.sandbox import run as sandbox
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.chat import ToolCall
from smallcoder_jax.tokenizers.chat_parser import Parsed, parse, same_value

Reward = Callable[[Sequence[Answer]], np.ndarray]  # float32 [N]

VERSION = 3  # raised whenever the reward of the same checked answer changes
# Rewards of a turn that has to call: for well-formed calls; for the right functions; for nearly the right arguments;
# for right calls. Without these intermediate rewards, all answers to a question often get the same one, and teach
# nothing.
WELL_FORMED, RIGHT_TOOL, ALIKE, RIGHT = 0.2, 0.5, 0.9, 1.0
_COMPARED = 1000  # characters of an argument that are compared: the time grows with their square


class RewardModel:
    """The score that a model of the stage `reward` gives to a question and its answer.

    It is the output of the head at the answer's last token, minus `cut_off_price` for an answer that was cut off, which
    the model cannot see. Raises UserError for a model without a head, or with another tokenizer than the policy's.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: Tokenizer, rows: int, cut_off_price: float):
        path = loaded.origin["path"]
        if loaded.head is None:
            raise UserError(f"rl.reward_model={path} has no scalar head; give the folder of a run of the stage reward")
        if loaded.tokenizer.hash != tokenizer.hash:
            raise UserError(f"rl.reward_model={path} has another tokenizer than the policy; train both from one model")
        self._context, self._rows, self._pad_id = loaded.model.context, rows, tokenizer.pad_id
        self._cut_off_price = cut_off_price
        self._params = {"model": loaded.params, "head": loaded.head}
        graph = build.abstract_model(loaded.model, loaded.compute)[0]

        def score(params: Any, tokens_BT: Array, segment_ids_BT: Array) -> Array:
            places_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
            module = build.bind(graph, build.model_params(params))
            hidden_BTD = module(tokens_BT, places_BT, segment_ids_BT).states_BTD
            last_B1 = jnp.maximum(segment_ids_BT.sum(axis=1, keepdims=True) - 1, 0)
            return scores_at(params["head"], hidden_BTD, last_B1)[:, 0]

        self._score = jax.jit(score)

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        ids = [answer.question.ids + answer.token_ids for answer in answers]
        longest = max(map(len, ids))
        if longest > self._context:
            raise UserError(
                f"an answer with its prompt has {longest} tokens, but the model of rl.reward_model has a context of "
                f"{self._context}; lower train.sequence_length or rl.answer_tokens"
            )
        scores_N = np.zeros(len(ids), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), self._rows):
            chosen = by_length[start : start + self._rows]
            scores_N[chosen] = self._batch([ids[i] for i in chosen])
        return scores_N - self._cut_off_price * np.array([not answer.ended for answer in answers], np.float32)

    def _batch(self, ids: list[tuple[int, ...]]) -> np.ndarray:
        length = min(bucket(max(map(len, ids))), self._context)
        tokens_BT = np.full((self._rows, length), self._pad_id, np.int32)
        segment_ids_BT = np.zeros((self._rows, length), np.int32)
        for row, one in enumerate(ids):
            tokens_BT[row, : len(one)], segment_ids_BT[row, : len(one)] = one, 1
        placed = jax.device_put((tokens_BT, segment_ids_BT), jax.tree.leaves(self._params)[0].sharding)
        return jax.device_get(self._score(self._params, *placed))[: len(ids)]


class CheckedReward:
    """The checked reward: 1 for a right answer to a `Turn` or `Body`, less for a partly right one, 0 for a wrong one.

    A turn that has to call gets `RIGHT` for the true calls; calls that run Python or a shell are also right when they
    print the same. Otherwise it gets between `RIGHT_TOOL` and `ALIKE`, depending on how similar its arguments are, when
    it calls the right functions, and `WELL_FORMED` for other well-formed calls. A turn that should call nothing gets
    `RIGHT` for any text without calls. A body gets the share of examples that hold (`bodies.share_right`).

    Surplus text, in addition to calls or after a body, costs the share `rl.surplus_price` of the reward. A turn that
    was cut off gets 0. A body that was cut off gets `rl.cut_off_price` less, but at least 0.

    Programs run in the sandbox, several at a time.
    """

    def __init__(self, tokenizer: Tokenizer, rl: RLConfig):
        self._tokenizer, self._rl = tokenizer, rl
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="reward")

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        return np.array(list(self._pool.map(self._grade, answers)), np.float32)

    def _grade(self, answer: Answer) -> float:
        facts = answer.question.facts
        if isinstance(facts, Turn):
            return self._grade_turn(facts, answer.token_ids)
        body, rest = split_body(facts.before, self._tokenizer.decode(list(answer.token_ids)))
        earned = self._less_surplus(share_right(facts, body), rest)
        return earned if answer.ended else max(earned - self._rl.cut_off_price, 0.0)

    def _less_surplus(self, earned: float, surplus: str) -> float:
        return earned * (1.0 - self._rl.surplus_price) if surplus.strip() else earned

    def _grade_turn(self, turn: Turn, ids: Sequence[int]) -> float:
        found = parse(ids, self._tokenizer, turn.tools)
        calls = found.message.tool_calls
        if not found.ended:
            return 0.0
        if not turn.calls:
            return RIGHT if found.message.content.strip() and not calls and not found.errors else 0.0
        return self._less_surplus(_calls_reward(found, turn), found.message.content)


def _calls_reward(found: Parsed, turn: Turn) -> float:
    """The reward of a turn that has to call, before surplus text is penalised."""
    calls = found.message.tool_calls
    valid, tool, same = call_levels(found, turn.calls)
    if tool and not found.errors:
        same = same or all(map(_equivalent, calls, turn.calls))
    if same:
        return RIGHT
    if tool:
        return RIGHT_TOOL + (ALIKE - RIGHT_TOOL) * likeness(calls, turn.calls)
    return WELL_FORMED if valid else 0.0


def likeness(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> float:
    """The similarity, from 0 to 1, of the arguments of `calls` to those of `wanted`.

    It is the mean over the wanted arguments, of which texts may match in part, and the superfluous ones, which count 0.
    """
    shares = []
    for call, one in zip(calls, wanted, strict=True):
        shares += [0.0] * len(call.arguments.keys() - one.arguments.keys())
        for name, value in one.arguments.items():
            found = call.arguments.get(name)
            if isinstance(value, str) and isinstance(found, str):
                texts = found[:_COMPARED], value[:_COMPARED]
                shares.append(difflib.SequenceMatcher(None, *texts, autojunk=False).ratio())
            else:
                shares.append(float(name in call.arguments and same_value(found, value)))
    return sum(shares) / len(shares) if shares else 0.0


def _equivalent(call: ToolCall, wanted: ToolCall) -> bool:
    """Whether a call that fits its schema equals the true call, or is a program that prints the same."""
    if call == wanted:
        return True
    if call.name not in _PROGRAMS:
        return False
    printed = printed_by(wanted.name, json.dumps(wanted.arguments))
    return bool(printed) and printed_by(call.name, json.dumps(call.arguments)) == printed


# The output of a test says little about the code in it, so tools that run tests are compared by their arguments alone.
_PROGRAMS = ("execute_python", "execute_bash")


@functools.lru_cache(CACHED)
def printed_by(name: str, arguments: str) -> str | None:
    """The output of a program in the sandbox; None when it fails or does not finish."""
    (program,) = json.loads(arguments).values()
    if "\0" in program or len(program.encode()) >= sandbox.MAX_ARGUMENT:
        return None
    run = sandbox.run_python if name == "execute_python" else sandbox.run_command
    outcome = run(program, limits=LIMITS)
    right = outcome.ended == "finished" and outcome.error is None and not outcome.exit_code
    return outcome.stdout.strip() if right else None
