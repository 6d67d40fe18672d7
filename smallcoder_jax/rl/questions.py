"""What a policy is asked, with what is known of a right answer."""

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

SHOWN, HIDDEN = 2, 4  # examples of a function, in its docstring and to be checked


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the assistant: the functions on offer, and the calls that are right; none: it answers by itself."""

    tools: tuple[dict[str, Any], ...]
    calls: tuple[chat.ToolCall, ...]


@dataclasses.dataclass(frozen=True)
class Body:
    """The rest of a function of the standard library: the code in front of it, which ends with a line; calls, with the
    values that they have to return, as text; and the `module` in which the true function is."""

    before: str
    examples: tuple[tuple[str, str], ...]
    module: str


def from_conversations(tokenizer: Tokenizer, *, side: str, count: int, seed: int, most_tokens: int) -> list[Question]:
    """First turns of the assistant in the first `count` generated conversations of a seed, of those whose request is on
    `side` of the split (`train` or `validation`). A turn whose true wording takes more than `most_tokens` is left out.

    Nothing is run: what the first turn calls depends on the request alone.
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
    """Functions of the standard library whose body is missing, with examples in the docstring, and others to be checked
    by. `draws`: of calls, of which examples are made; the same in every run. A function is on one side of the split
    (`train` or `validation`) by its name, whatever its examples. Values that are all alike check nothing: those
    questions are left out."""
    rng = random.Random("bodies")
    snippets: dict[str, Snippet] = {}
    examples: dict[str, dict[str, str]] = collections.defaultdict(dict)  # of a source: the value of every call
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
    """What the function needs, its head and a docstring with examples; None where the body is in the head's line."""
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
