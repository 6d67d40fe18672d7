"""Conversations that call functions: sampled from a grammar, with responses from really executed calls.

A conversation depends only on the seed, its index, the running Python and the answers of `execute`, so that any number
of workers may share the indices.
"""

from __future__ import annotations

import dataclasses
import platform
import random
from typing import Any

from smallcoder_jax.data.conversations.record import Record, side_of
from smallcoder_jax.data.conversations.requests import KINDS, Plan
from smallcoder_jax.tokenizers.chat import Conversation, Message
from smallcoder_jax.toolbox.functions import TOOLS, Execute, call_tool

FORMAT = 2  # increased whenever the same seed and index start to give another conversation
_SYSTEM = ("", "You are a coding assistant.", "You help people with Python.", "Answer briefly.")
_MOST_TOOLS = 3  # available functions in one conversation


@dataclasses.dataclass(frozen=True)
class Draft:
    """A request before any call was made. It is cheap, so that drafts can be selected by their side before calling."""

    plan: Plan
    kind: str
    system: str
    tools: tuple[str, ...]
    seed: int
    index: int

    @property
    def side(self) -> str:
        return side_of(self.plan.request)

    @property
    def prompt(self) -> Conversation:
        """The request to the assistant, with the available functions."""
        system = [Message("system", self.system)] if self.system else []
        return Conversation((*system, Message("user", self.plan.request)), tuple(TOOLS[name] for name in self.tools))

    @property
    def provenance(self) -> dict[str, Any]:
        return {
            "generator": f"conversations {FORMAT}",
            "seed": self.seed,
            "index": self.index,
            "kind": self.kind,
            "source": self.plan.source,
            "python": platform.python_version(),
        }


def draw(seed: int, index: int) -> Draft:
    """The request for a seed and an index, with the available functions."""
    rng = random.Random(f"conversation|{FORMAT}|{seed}|{index}")
    (kind,) = rng.choices(list(KINDS), weights=[share for _, share in KINDS.values()])
    plan = KINDS[kind][0](rng)
    others = [name for name in TOOLS if name not in plan.tools]
    extra = rng.sample(others, rng.randint(1, _MOST_TOOLS - len(plan.tools)))
    tools = [*plan.tools, *extra]
    rng.shuffle(tools)
    return Draft(plan, kind, rng.choice(_SYSTEM), tuple(tools), seed, index)


def complete(draft: Draft, execute: Execute) -> Record:
    """The conversation of a draft, with the responses of its executed calls."""
    plan, prompt = draft.plan, draft.prompt
    messages = list(prompt.messages)
    responses: list[str] = []
    for step in plan.steps:
        calls = step(responses)
        messages.append(Message("assistant", "", calls))
        found = [call_tool(call.name, call.arguments, execute) for call in calls]
        messages += [Message("tool", text) for text in found]
        responses += found
    messages.append(Message("assistant", plan.answer(responses)))
    return Record(Conversation(tuple(messages), prompt.tools), draft.side, draft.provenance)
