"""Preferences from real code: the original body of a function, and a body with mistakes of one kind.

The prompt is the signature with the docstring. The changed body differs from the original in one to three places and is
identical elsewhere, down to the whitespace, so that only the mistakes distinguish them. No code is executed.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import hashlib
import io
import itertools
import random
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from smallcoder_jax.data.preferences.pair import Preference
from smallcoder_jax.data.sources.document import Document

FORMAT = 1  # increased whenever the same documents and seed start to give other pairs
PROMPT_CHARACTERS, BODY_CHARACTERS = 500, 400  # at most; some 120 tokens each with a tokenizer for code
_MISTAKES = 3  # the most in one body; a small model does not notice a single one in a long body
_READ = 4  # functions that are read per pair; the first ones alone would come from a few neighbouring folders
_LEAST_TOKENS = 4  # of a body; a shorter one has nothing to change
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_OPERATORS = {
    "+": "-", "-": "+", "*": "//", "/": "*", "//": "*", "%": "//", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
    "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|=", "and": "or", "or": "and",
}  # fmt: skip
_COMPARISONS = {
    "==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "is": "is not", "in": "not in", "not": "",
}  # fmt: skip
_CONSTANTS = {"True": "False", "False": "True"}


@dataclasses.dataclass(frozen=True)
class Function:
    """A function without its indentation: `prompt` is everything up to and including its docstring, and `body` the
    rest. Both consist of whole lines."""

    name: str
    prompt: str
    body: str
    document: Document
    line: int

    @property
    def text(self) -> str:
        return self.prompt + self.body


@dataclasses.dataclass(frozen=True)
class _Change:
    """Replaces the characters from `start` to `stop` of a function's text by `new`."""

    start: int
    stop: int
    new: str
    reason: str


def code_pairs(documents: Iterable[Document], *, count: int, seed: int) -> Iterator[Preference]:
    """Up to `count` pairs: first one pair per function, by a randomly chosen criterion, then a second pair per function
    by another criterion, and so on.

    Documents are read until there are `_READ` functions for each pair, and a random sample of the functions is used.
    """
    functions = list(itertools.islice(_different(documents), _READ * count))
    random.Random(f"functions|{FORMAT}|{seed}").shuffle(functions)
    del functions[count:]
    foreign = sorted({name for function in functions for name in _parameters(function)})
    waiting = [_pairs_of(function, foreign, seed) for function in functions]
    left = count
    while waiting and left:
        drawn = [(pairs, pair) for pairs in waiting if (pair := next(pairs, None))]
        yield from (pair for _, pair in drawn[:left])
        waiting, left = [pairs for pairs, _ in drawn], left - len(drawn[:left])


def functions_of(document: Document) -> Iterator[Function]:
    """The functions and methods of a Python document that are short enough, without those inside functions."""
    if "\r" in document.text:
        return
    try:
        with warnings.catch_warnings():  # about invalid escape sequences
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = [line + "\n" for line in document.text.split("\n")]  # the lines as Python counts them
    for node in _function_nodes(tree):
        function = _cut_out(node, lines, document)
        if function and len(function.prompt) <= PROMPT_CHARACTERS and len(function.body) <= BODY_CHARACTERS:
            yield function


def _different(documents: Iterable[Document]) -> Iterator[Function]:
    seen = set[str]()
    for document in documents:
        if document.language == "python":
            for function in functions_of(document):
                if function.text not in seen and len(_body_tokens(function)) >= _LEAST_TOKENS:
                    seen.add(function.text)
                    yield function


def _function_nodes(tree: ast.Module | ast.ClassDef) -> Iterator[_FunctionNode]:
    for node in tree.body:
        if isinstance(node, _FunctionNode):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _function_nodes(node)


def _cut_out(node: _FunctionNode, lines: Sequence[str], document: Document) -> Function | None:
    """The function of `node`. None where its body begins on the line of the signature or is only a docstring, where the
    text is not plain ASCII, and where it does not parse without its indentation."""
    statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not statements:
        return None
    own, indent = lines[node.lineno - 1 : node.end_lineno], node.col_offset
    first = min(item.lineno for item in (statements[0], *getattr(statements[0], "decorator_list", ())))
    begins = first - node.lineno
    if not begins or own[begins][: statements[0].col_offset].strip():
        return None
    cut = [line[indent:] if line.strip() else "\n" for line in own]
    plain = all(line.isascii() and line[:-1].replace("\t", " ").isprintable() for line in cut)
    if not plain or any(line[:indent].strip() for line in own):  # a text of several lines may lack the indentation
        return None
    prompt, body = "".join(cut[:begins]), "".join(cut[begins:]).rstrip() + "\n"
    return Function(node.name, prompt, body, document, node.lineno) if _tree(prompt + body) else None


def _pairs_of(function: Function, foreign: Sequence[str], seed: int) -> Iterator[Preference]:
    rng = random.Random(f"{FORMAT}|{seed}|{hashlib.sha256(function.text.encode()).hexdigest()}")
    for criterion in rng.sample(list(CRITERIA), len(CRITERIA)):
        most = 1 if criterion in ("order", "truncated") else rng.randint(1, _MISTAKES)
        changes = list(CRITERIA[criterion](function, foreign, rng))
        made: list[_Change] = []
        for change in rng.sample(changes, len(changes)):
            together = _apply(function.text, [*made, change])
            if len(made) < most and (criterion == "truncated" or _is_other_code(function.text, together)):
                made.append(change)
        if made:
            where = {"path": function.document.path, "line": function.line, "name": function.name}
            provenance = {"source": function.document.source, "document": function.document.hash, **where}
            rejected, reason = _apply(function.text, made)[len(function.prompt) :], "; ".join(c.reason for c in made)
            yield Preference(function.prompt, function.body, rejected, criterion, reason, provenance)


def _apply(text: str, changes: Sequence[_Change]) -> str:
    for change in sorted(changes, key=lambda change: change.start, reverse=True):
        text = text[: change.start] + change.new + text[change.stop :]
    return text


def _is_other_code(text: str, spoilt: str) -> bool:
    before, after = _tree(text), _tree(spoilt)
    return before is not None and after is not None and ast.dump(before) != ast.dump(after)


def _tree(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _body_tokens(function: Function) -> list[tokenize.TokenInfo]:
    """The tokens of the body that are text (no comments or line ends), with positions in the whole function."""
    first = function.prompt.count("\n") + 1
    empty = (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT)
    tokens = tokenize.generate_tokens(io.StringIO(function.text).readline)
    return [token for token in tokens if token.start[0] >= first and token.type not in empty]


def _offsets(text: str) -> list[int]:
    """The offset at which each line begins; the first line is at index 1, because lines are counted from 1."""
    return [0, 0, *itertools.accumulate(len(line) for line in text.splitlines(keepends=True))]


def _swaps(table: dict[str, str]) -> Callable[[Function, Sequence[str], random.Random], Iterator[_Change]]:
    def swaps(function: Function, foreign: Sequence[str], rng: random.Random) -> Iterator[_Change]:
        starts, text = _offsets(function.text), function.text
        for token in _body_tokens(function):
            if token.type in (tokenize.OP, tokenize.NAME) and token.string in table:
                start, new = starts[token.start[0]] + token.start[1], table[token.string]
                stop = start + len(token.string)
                if new:
                    yield _Change(start, stop, new, f"`{token.string}` became `{new}`")
                elif text[stop] == " ":
                    yield _Change(start, stop + 1, "", f"`{token.string}` is missing")

    return swaps


def _constants(function: Function, foreign: Sequence[str], rng: random.Random) -> Iterator[_Change]:
    yield from _swaps(_CONSTANTS)(function, foreign, rng)
    starts = _offsets(function.text)
    for token in _body_tokens(function):
        if token.type == tokenize.NUMBER and token.string.isdecimal():
            number = int(token.string)
            new = str(rng.choice([number + 1, 2 * number + 2, *[number - 1] * (number > 0)]))
            start = starts[token.start[0]] + token.start[1]
            yield _Change(start, start + len(token.string), new, f"`{number}` became `{new}`")


def _names(function: Function, foreign: Sequence[str], rng: random.Random) -> Iterator[_Change]:
    """Replaces a name that is read by another name of the function, or by one that only other functions have."""
    tree, starts = ast.parse(function.text), _offsets(function.text)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = sorted({node.id for node in names} | set(_parameters(function)))
    undefined = [name for name in foreign if name not in own and not hasattr(builtins, name)]
    for node in names:
        start = starts[node.lineno] + node.col_offset
        stop = start + len(node.id)
        # In formatted strings Python 3.11 reports wrong positions of names.
        placed = start >= len(function.prompt) and function.text[start:stop] == node.id
        if isinstance(node.ctx, ast.Load) and placed:
            others = [name for name in own if name != node.id]
            new = rng.choice(rng.choice([found for found in (others, undefined) if found] or [[node.id + "_"]]))
            kind = "another name" if new in own else "a name that is not defined"
            yield _Change(start, stop, new, f"`{node.id}` became `{new}`, {kind}")


def _orders(function: Function, foreign: Sequence[str], rng: random.Random) -> Iterator[_Change]:
    """Reorders the statements of a block so that one of them comes before another that it needs."""
    starts = _offsets(function.text)
    for node in ast.walk(ast.parse(function.text)):
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            own = [item for item in block if starts[item.lineno] >= len(function.prompt)] if type(block) is list else []
            ends = [item.end_lineno or 0 for item in own]
            if len(own) < 2 or any(end >= after.lineno for end, after in zip(ends, own[1:], strict=False)):
                continue
            # A comment belongs to the statement after it.
            borders = [starts[own[0].lineno], *(starts[end + 1] for end in ends)]
            texts = [function.text[start:stop] for start, stop in itertools.pairwise(borders)]
            order = rng.sample(range(len(own)), len(own))
            for place, first in enumerate(order):
                broken = next((i for i in order[place + 1 :] if i < first and _depends(own[first], own[i])), None)
                if broken is not None:
                    one, other = (ast.unparse(own[i]).splitlines()[0] for i in (first, broken))
                    reason = f"`{one}` stands before `{other}`"
                    yield _Change(borders[0], borders[-1], "".join(texts[i] for i in order), reason)
                    break


def _depends(second: ast.stmt, first: ast.stmt) -> bool:
    if any(getattr(statement, "decorator_list", None) for statement in (first, second)):
        return False  # a decorated statement begins before its `lineno`
    ends = (ast.Return, ast.Raise, ast.Break, ast.Continue)
    if isinstance(second, ends):
        return not isinstance(first, ends)
    return bool(_mentioned(first, ast.Store) & _mentioned(second, ast.Load))


def _mentioned(statement: ast.stmt, context: type[ast.expr_context]) -> set[str]:
    found = set[str]()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, context):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def _truncations(function: Function, foreign: Sequence[str], rng: random.Random) -> Iterator[_Change]:
    """Ends the text after a token that is not the last; in half of the cases after the line end that follows it."""
    starts, text = _offsets(function.text), function.text
    for token in _body_tokens(function)[:-1]:
        stop = starts[token.end[0]] + token.end[1]
        if text[stop] == "\n" and rng.random() < 0.5:
            stop += 1
        yield _Change(stop, len(text), "", f"ends behind `{text[:stop].splitlines()[-1].strip()}`")


def _parameters(function: Function) -> list[str]:
    (node,) = ast.parse(function.text).body
    return [item.arg for item in ast.walk(node) if isinstance(item, ast.arg)]


# The possible mistakes of a rejected body.
CRITERIA: dict[str, Callable[[Function, Sequence[str], random.Random], Iterator[_Change]]] = {
    "operator": _swaps(_OPERATORS),
    "comparison": _swaps(_COMPARISONS),
    "constant": _constants,
    "name": _names,
    "order": _orders,
    "truncated": _truncations,
}
