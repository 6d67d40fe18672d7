"""The questions that a policy is asked, with the facts by which answers are checked."""

from __future__ import annotations

import ast
import collections
import dataclasses
import random
from typing import Any

from smallcoder_jax.data.conversations.record import side_of
from smallcoder_jax.data.conversations.snippets import Snippet, draw_callable
from smallcoder_jax.data.conversations.tools import different
from smallcoder_jax.rl.rollouts import Question
from smallcoder_jax.tokenizers import chat
from smallcoder_jax.tokenizers.base import Tokenizer

SHOWN, HIDDEN = 2, 4  # examples of a function: in its docstring, and kept back for checking


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the assistant: the tools on offer, and the right calls; without calls, a text answer is right."""

    tools: tuple[dict[str, Any], ...]
    calls: tuple[chat.ToolCall, ...]


@dataclasses.dataclass(frozen=True)
class Body:
    """The missing body of a function of the standard library.

    `before` is the code up to the body, which ends with a newline. `examples` are calls and the values that they have
    to return, both as text. `module` is the module of the true function.
    """

    before: str
    examples: tuple[tuple[str, str], ...]
    module: str


def from_conversations(tokenizer: Tokenizer, *, side: str, count: int, seed: int, most_tokens: int) -> list[Question]:
    """Questions that ask for the assistant's first turn in generated conversations.

    Of the first `count` conversations of the seed, those whose request is on `side` of the split (`train` or
    `validation`) are used. A turn whose reference text takes more than `most_tokens` is left out. Nothing is executed,
    because the calls of the first turn depend only on the request.
    """
    found = []
    for draft in different(seed, count):
        if draft.side != side:
            continue
        plan, prompt = draft.plan, draft.prompt
        calls = plan.steps[0](()) if plan.steps else ()
        turn = chat.Message("assistant", "" if calls else plan.answer(()), calls)
        ids = chat.encode(prompt, tokenizer, reply=True).ids
        whole = chat.encode(chat.Conversation((*prompt.messages, turn), prompt.tools), tokenizer)
        if len(whole) - len(ids) <= most_tokens:
            found.append(Question(tuple(ids.tolist()), Turn(prompt.tools, calls)))
    return found


def from_code(tokenizer: Tokenizer, *, side: str, draws: int) -> list[Question]:
    """Questions that ask for the missing body of a function of the standard library.

    Some examples are shown in the docstring, and others are kept back for checking. They come from `draws` random
    calls, which are the same in every run. The name of a function alone decides its side of the split (`train` or
    `validation`). Questions whose hidden examples all have the same value are left out, because they check nothing.
    """
    rng = random.Random("bodies")
    snippets: dict[str, Snippet] = {}
    examples: dict[str, dict[str, str]] = collections.defaultdict(dict)  # by source: the value of every call
    for _ in range(draws):
        snippet, call, value = draw_callable(rng)
        if side_of(f"body of {snippet.name}") == side and value is not None:
            snippets[snippet.source] = snippet
            examples[snippet.source][call] = repr(value)
    found = []
    for source in sorted(snippets):
        known = list(examples[source].items())
        for start in range(0, len(known) - SHOWN - HIDDEN + 1, SHOWN + HIDDEN):
            before = _without_body(snippets[source], known[start : start + SHOWN])
            hidden = tuple(known[start + SHOWN : start + SHOWN + HIDDEN])
            if before is not None and len({value for _, value in hidden}) > 1:
                module = source.removeprefix("stdlib:").rpartition(".")[0]
                facts = Body(before, hidden, module)
                found.append(Question((tokenizer.bos_id, *tokenizer.encode(before)), facts))
    return found


def _without_body(snippet: Snippet, shown: list[tuple[str, str]]) -> str | None:
    """The code that the function needs, its head, and a docstring with examples; None if head and body share a line."""
    lines = snippet.code.split("\n")
    (function,) = (
        node for node in ast.parse(snippet.code).body
        if isinstance(node, ast.FunctionDef) and node.name == snippet.name
    )  # fmt: skip
    body, end = function.body[0], function.end_lineno or 0
    if body.lineno == function.lineno:
        return None
    others = "\n".join(lines[: function.lineno - 1] + lines[end:]).strip()
    head = "\n".join(lines[function.lineno - 1 : body.lineno - 1])
    docstring = ['r"""', *(line for call, value in shown for line in (f">>> {call}", value)), '"""']
    indented = "\n".join(" " * body.col_offset + line for line in docstring)
    return (others + "\n\n\n" if others else "") + f"{head}\n{indented}\n"
