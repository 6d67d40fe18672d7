"""The six functions that conversations call: their schemas and their implementations.

Programs are run by `execute`, which the caller passes: `execute("execute_python", {"code": ...})` and
`execute("execute_bash", {"command": ...})` return what the program wrote. `run_tests` and `debug_code` wrap the given
code in a Python program. `analyze_code` uses `ast`, and `search_docs` searches the documentation of the running Python.
"""

from __future__ import annotations

import ast
import collections
import functools
import importlib
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

Execute = Callable[[str, dict[str, Any]], str]

ASPECTS = ("functions", "imports", "calls", "complexity")
MAX_CHARACTERS = 1200  # of a response; a longer one is cut, and a last line says how much is omitted
# The modules of the standard library whose documentation is searched: those that code of every kind uses.
DOCUMENTED = (
    "base64", "bisect", "calendar", "cmath", "collections", "colorsys", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "difflib", "fnmatch", "fractions", "functools", "glob", "gzip", "hashlib", "heapq", "html", "inspect",
    "io", "ipaddress", "itertools", "json", "keyword", "linecache", "math", "operator", "os", "os.path", "pathlib",
    "pickle", "pprint", "queue", "random", "re", "secrets", "shlex", "shutil", "statistics", "string", "struct",
    "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types",
    "unicodedata", "urllib.parse", "uuid", "weakref", "zipfile", "zlib",
)  # fmt: skip


def _tool(name: str, description: str, required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_STRING = {"type": "string"}
TOOLS: dict[str, dict[str, Any]] = {
    tool["function"]["name"]: tool
    for tool in (
        _tool("execute_python", "Run Python code and return what it prints.", ("code",), code=_STRING),
        _tool("execute_bash", "Run a shell command and return its output.", ("command",), command=_STRING),
        _tool(
            "search_docs",
            "Search the documentation of Python's standard library.",
            ("query",),
            query=_STRING,
            limit={"type": "integer"},
        ),
        _tool(
            "analyze_code",
            "Report one aspect of Python code without running it.",
            ("code", "aspect"),
            code=_STRING,
            aspect={"type": "string", "enum": list(ASPECTS)},
        ),
        _tool("run_tests", "Run assert statements against code.", ("code", "tests"), code=_STRING, tests=_STRING),
        _tool("debug_code", "Run code that fails and return the traceback.", ("code",), code=_STRING),
    )
}

_TESTS = """\
import ast
code, tests = {code!r}, {tests!r}
space = {{"__name__": "code"}}
exec(compile(code, "code.py", "exec"), space)
passed = failed = 0
for statement in ast.parse(tests).body:
    text = ast.get_source_segment(tests, statement)
    try:
        exec(compile(text, "tests.py", "exec"), space)
        passed += 1
    except Exception as error:
        failed += 1
        found = f"{{type(error).__name__}}: {{error}}"
        if type(error) is AssertionError and isinstance(statement.test, ast.Compare):
            found = "got " + repr(eval(ast.get_source_segment(tests, statement.test.left), space))
        print(f"FAILED {{text}} ({{found}})")
print(f"{{passed}} passed, {{failed}} failed")
"""
_DEBUG = """\
import linecache, traceback
code = {code!r}
linecache.cache["code.py"] = (len(code), None, code.splitlines(True), "code.py")
try:
    exec(compile(code, "code.py", "exec"), {{"__name__": "__main__"}})
except Exception as error:
    print("".join(traceback.format_exception(error.with_traceback(error.__traceback__.tb_next))), end="")
"""


# Python 3.11 keeps one depth counter for the syntax trees of all threads, so that parsing on two threads at once fails.
_PARSING = threading.Lock()


def call_tool(name: str, arguments: Mapping[str, Any], execute: Execute) -> str:
    """The response of a function to arguments that match its schema, without trailing newlines and cut to
    `MAX_CHARACTERS`. Raises KeyError for a name that is not in `TOOLS`."""
    text = _RESPONSES[name](arguments, execute).rstrip("\n")
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}\n[{len(text) - MAX_CHARACTERS} more characters]"


def analyze(code: str, aspect: str) -> dict[str, Any]:
    """One aspect of Python code: the functions with their arguments, the imported modules or the called names, each
    once and in order; or McCabe's number of independent paths (1 + decisions)."""
    with _PARSING:
        nodes = _in_order(ast.parse(code))
    if aspect == "functions":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = [f"{node.name}({ast.unparse(node.args)})" for node in nodes if isinstance(node, kinds)]
    elif aspect == "imports":
        found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    elif aspect == "calls":
        found = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    else:
        kinds = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension)
        decisions = sum(isinstance(node, kinds) for node in nodes)
        decisions += sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
        return {"complexity": 1 + decisions}
    return {aspect: list(dict.fromkeys(found))}


def search(query: str, limit: int) -> list[str]:
    """The `limit` entries of the documentation that match best, as `name(signature): first sentence`, best first."""
    entries, rarity = documentation(), _rarity()
    words = set(_words(query))
    scores = []
    for name, (line, entry_words) in entries.items():
        shared = words & entry_words
        score = sum(rarity[word] for word in shared) / math.sqrt(len(entry_words))
        scores.append((-score - 100 * (name == query), name, line))
    return [line for score, _, line in sorted(scores)[:limit] if score < 0]


@functools.cache
def documentation() -> dict[str, tuple[str, frozenset[str]]]:
    """The documentation by full name in alphabetical order: the line that `search` returns, and the words it
    matches."""
    found = {}
    for module in DOCUMENTED:
        names = dict(vars(importlib.import_module(module)))
        for name, value in names.items():
            if name.startswith("_") or not callable(value):
                continue
            # Hooks exist twice (sys.__excepthook__), because the running program may have replaced them; they are
            # skipped. This also skips some functions of `operator`.
            if f"__{name}__" in names:
                continue
            if (getattr(value, "__module__", None) or module).split(".")[0].lstrip("_") not in _owners(module):
                continue
            sentence = first_sentence(inspect.getdoc(value) or "")
            if sentence:
                line = f"{module}.{name}{_signature(value)}: {sentence}"
                found[f"{module}.{name}"] = (line, frozenset(_words(f"{module} {name} {sentence}")))
    return dict(sorted(found.items()))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; empty where it is only a signature or too long for a summary."""
    paragraphs = [part for part in text.split("\n\n") if not re.match(r"[\w.]+\(.*", part.strip())]
    line = " ".join(paragraphs[0].split()) if paragraphs else ""
    sentence = re.split(r"(?<=[a-z)])\.(?:\s|$)", line, maxsplit=1)[0].rstrip(".")
    return sentence + "." if 15 <= len(sentence) <= 120 else ""


@functools.cache
def _rarity() -> Mapping[str, float]:
    entries = documentation()
    counts = collections.Counter(word for _, words in entries.values() for word in words)
    return {word: math.log(1 + len(entries) / count) for word, count in counts.items()}


def _owners(module: str) -> tuple[str, ...]:
    """The modules in which the functions of `module` may be defined. Names that it imports from others are skipped."""
    return (module.split(".")[0], "posixpath", "ntpath", "genericpath", "posix", "nt", "builtins", "pydatetime")


def _signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (ValueError, TypeError):
        return "(...)"
    return text if len(text) <= 80 and " at 0x" not in text else "(...)"  # addresses differ from run to run


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _in_order(tree: ast.AST) -> list[ast.AST]:
    """All nodes in the order of the source text, unlike `ast.walk`."""
    nodes: list[ast.AST] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(reversed(list(ast.iter_child_nodes(node))))
    return nodes


def _run_program(program: str) -> Callable[[Mapping[str, Any], Execute], str]:
    return lambda arguments, execute: execute("execute_python", {"code": program.format(**arguments)})


_RESPONSES: dict[str, Callable[[Mapping[str, Any], Execute], str]] = {
    "execute_python": lambda arguments, execute: execute("execute_python", dict(arguments)),
    "execute_bash": lambda arguments, execute: execute("execute_bash", dict(arguments)),
    "search_docs": lambda arguments, _: "\n".join(search(arguments["query"], arguments.get("limit", 1))) or "no match",
    "analyze_code": lambda arguments, _: json.dumps(analyze(**arguments), ensure_ascii=False),
    "run_tests": _run_program(_TESTS),
    "debug_code": _run_program(_DEBUG),
}
