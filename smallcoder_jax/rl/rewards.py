"""What an answer is worth: by a reward model, by the function calls in it, or by running the code that it is.

A reward is a function of answers, of which each gets one number.

Shapes: N answers; B rows, T places of a row.
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

VERSION = 3  # raised when the same checked answers begin to be worth something else
# Of a turn that has to call: well-formed calls; of the right functions; with nearly the arguments wanted; right in all.
# Without a way from one to the next, all answers to a question are often worth the same, and teach nothing.
WELL_FORMED, RIGHT_TOOL, ALIKE, RIGHT = 0.2, 0.5, 0.9, 1.0
_COMPARED = 1000  # characters of an argument: comparing takes their square


class RewardModel:
    """The score that a model of the stage `reward` gives to question and answer: of its head, on the hidden state of
    the answer's last token; less `cut_off_price` where the answer was cut off, which the model cannot know.

    Raises UserError for a model without a head, or with another tokenizer than the one that answers are written in.
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
    """1 for a right answer to a `Turn` or `Body`, less for one that is partly right, 0 for one that is not.

    A turn earns `WELL_FORMED`, or from `RIGHT_TOOL` to `ALIKE` by how like its arguments are to those of the true
    calls, or `RIGHT`. It is right with just these; where they run Python or a shell, also with others that print the
    same. In a turn that is to call nothing, what is written is not judged, but that it ends. Of a body counts the share
    of examples that hold (`bodies.share_right`).

    Text that nobody asked for, beside calls or behind a body, takes `rl.surplus_price` of what the rest has earned. A
    turn that was cut off earns nothing, a body `rl.cut_off_price` less, but never less than nothing.

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
        return self._less_surplus(_worth(found, turn), found.message.content)


def _worth(found: Parsed, turn: Turn) -> float:
    """Of a turn that has to call, without the price of what is beside the calls."""
    calls = found.message.tool_calls
    valid, tool, same = call_levels(found, turn.calls)
    if tool and not found.errors:
        same = same or all(map(_as_good, calls, turn.calls))
    if same:
        return RIGHT
    if tool:
        return RIGHT_TOOL + (ALIKE - RIGHT_TOOL) * likeness(calls, turn.calls)
    return WELL_FORMED if valid else 0.0


def likeness(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> float:
    """From 0 to 1: the mean over the arguments of the wanted calls, of which texts may be alike in part, and over those
    that nobody wanted, which count 0."""
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


def _as_good(call: ToolCall, wanted: ToolCall) -> bool:
    """Whether a call that fits its schema does what the true call does."""
    if call == wanted:
        return True
    if call.name not in _PROGRAMS:
        return False
    printed = printed_by(wanted.name, json.dumps(wanted.arguments))
    return bool(printed) and printed_by(call.name, json.dumps(call.arguments)) == printed


# What a test prints says little about the code in it: these are right by their arguments alone.
_PROGRAMS = ("execute_python", "execute_bash")


@functools.lru_cache(CACHED)
def printed_by(name: str, arguments: str) -> str | None:
    """What a program prints in the sandbox; None where it fails, or does not come to its end."""
    (program,) = json.loads(arguments).values()
    if "\0" in program or len(program.encode()) >= sandbox.MAX_ARGUMENT:
        return None
    run = sandbox.run_python if name == "execute_python" else sandbox.run_command
    outcome = run(program, limits=LIMITS)
    right = outcome.ended == "finished" and outcome.error is None and not outcome.exit_code
    return outcome.stdout.strip() if right else None
