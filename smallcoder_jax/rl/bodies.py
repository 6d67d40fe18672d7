"""Function bodies written by a model: where a body ends, whether it cheats, and how many of its examples are right.

A body has to compute its values. The function asked for is in the standard library, so a body that gets hold of it, by
an import or by reading its source, would be right without any understanding. Two barriers prevent that. Before anything
runs, the names that the body uses are checked (`overreach`). While it runs, it cannot open files or load modules, and
the module of the true function is absent. The expected values stay in this process, and values are compared with their
exact types.
"""

from __future__ import annotations

import ast
import collections
import functools
import io
import sys
import tokenize
from typing import Any

from smallcoder_jax.evaluate.completions import tree_of
from smallcoder_jax.rl.questions import Body
from smallcoder_jax.sandbox import run as sandbox

LIMITS = sandbox.Limits(wall_s=5.0, cpu_s=5, memory_bytes=512 << 20)
CACHED = 10_000  # runs whose outcome is cached

IMPORTABLE = ("collections", "itertools", "math", "re")  # by a body; no question asks for a function of these
# Builtins and attributes that give access to objects by names not in the source, to more code, to files or to frames.
_LOOK_UPS = ("delattr", "getattr", "globals", "locals", "setattr", "vars")
_BUILTINS = ("breakpoint", "compile", "eval", "exec", "help", "input", "open", *_LOOK_UPS)
_FRAMES = ("ag_frame", "cr_frame", "gi_frame", "tb_frame", "f_back", "f_builtins", "f_globals", "f_locals")
_HARMLESS = ("__class__", "__doc__", "__init__", "__name__", "__qualname__")
_MODULES = sys.stdlib_module_names | {"path"}  # such as os.path, re.enum, random._bisect

# Runs before a body and restricts it. A hook for audit events cannot be removed again.
_CLOSED = """\
import sys
for name in {loaded!r}:
    __import__(name)
sys.modules.update(dict.fromkeys({hidden!r}))
def refuse(event, _):
    if event in ("import", "open") or event.startswith(("os.", "gc.", "subprocess.")):
        raise PermissionError(event + " is not for a body")
sys.addaudithook(refuse)
del sys, name, refuse
"""


def split_body(before: str, text: str) -> tuple[str, str]:
    """Splits `text` at the end of the function whose first lines are the last ones of `before`.

    Python's tokenizer determines the end, because comments and the inside of strings may begin in the first column.
    Lines end only with a newline. When the tokenizer finds no end, all of `text` is body.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as the compiler reads them
    if "\0" in text:  # invalid in Python; the tokenizer of CPython 3.13 raises SystemError for it
        return text, ""
    lines, first = io.StringIO(before + text).readlines(), before.count("\n")
    depth, end = 0, first
    try:
        for token in tokenize.generate_tokens(iter(lines).__next__):
            depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            if token.type == tokenize.NEWLINE:
                end = max(first, token.start[0])
            elif token.type == tokenize.DEDENT and depth == 0 and token.start[0] > first:
                return "".join(lines[first:end]), "".join(lines[end:])
    except (tokenize.TokenError, SyntaxError):
        pass
    return text, ""


def overreach(question: Body, body: str) -> str | None:
    """The reason to refuse a body, or None.

    A body may use only its arguments, the code before it, the builtins and `IMPORTABLE`. Anything that could lead
    further, for example to the true function, is refused: other imports, most names between double underscores,
    builtins that look up names or run text, frames, and attributes that have the name of a module and are not called.
    An honest body seldom has any of these. Text that is not valid Python is refused too.
    """
    tree = tree_of(question.before + body)
    if tree is None:
        return "it is no Python"
    nodes = [node for node in ast.walk(tree) if getattr(node, "lineno", 0) > question.before.count("\n")]
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        names, modules, attributes = _reached(node)
        for name in (*names, *attributes):
            special = name.startswith("__") and name.endswith("__") and name not in _HARMLESS
            if special or name in _BUILTINS or name in _FRAMES:
                return f"it names {name}"
        for name in modules:
            if name not in IMPORTABLE or name == question.module:
                return f"it imports {name}"
        for name in attributes:
            if id(node) not in called and (name in _MODULES or name.lstrip("_") in _MODULES):
                return f"it reaches for {name}, which may be a module"
    return None


def _reached(node: ast.AST) -> tuple[list[str], list[str], list[str]]:
    """The names, modules and attributes that a node looks up."""
    if isinstance(node, ast.Name):
        return [node.id], [], []
    if isinstance(node, ast.Import):
        return [], [alias.name for alias in node.names], []
    if isinstance(node, ast.ImportFrom):
        return [], ["." * node.level + (node.module or "")], [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute):
        return [], [], [node.attr]
    if isinstance(node, ast.MatchClass):
        return [], [], node.kwd_attrs
    return [], [], []


def share_right(question: Body, body: str) -> float:
    """The share, from 0 to 1, of a question's examples that hold, beyond those that the best constant answer gets
    right.

    An example holds when the call returns the expected value with the same type.
    """
    values = [value for _, value in question.examples]
    held = _held(question, body) if overreach(question, body) is None else 0
    constant = max(collections.Counter(values).values())
    if constant == len(values):
        return float(held == constant)
    return max(held - constant, 0) / (len(values) - constant)


@functools.lru_cache(CACHED)
def _held(question: Body, body: str) -> int:
    """The number of examples that hold for a body that `overreach` has accepted."""
    calls = []
    for example, _ in question.examples:
        call: Any = ast.parse(example, mode="eval").body
        calls.append(sandbox.Call(call.func.id, tuple(map(ast.literal_eval, call.args))))
    loaded = (*IMPORTABLE, "heapq", *_imported(question.before + body))  # Counter.most_common imports heapq
    closed = _CLOSED.format(loaded=loaded, hidden=(question.module, "_" + question.module))
    outcome = sandbox.run_python(closed + question.before + body, calls=calls, limits=LIMITS)
    if outcome.ended != "finished":
        return 0
    values = [ast.literal_eval(value) for _, value in question.examples]
    return sum(map(sandbox.Result.is_value, outcome.results, values))


def _imported(code: str) -> tuple[str, ...]:
    """The modules that the top level of `code` imports."""
    tree = tree_of(code)
    top = tree.body if tree else []
    whole = (alias.name for node in top if isinstance(node, ast.Import) for alias in node.names)
    return (*whole, *(node.module or "" for node in top if isinstance(node, ast.ImportFrom)))
