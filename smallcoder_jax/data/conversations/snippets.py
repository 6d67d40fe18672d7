"""Real code for conversations: functions of the running Python's standard library, with the definitions that they need.

Some can be called with arguments that are sampled here, others are only for reading. The only code that is executed is
the library's own function, to get the value of a call.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import random
from collections.abc import Callable
from typing import Any

READ = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "code", "codeop", "colorsys", "configparser", "copy",
    "csv", "difflib", "dis", "email.utils", "filecmp", "fileinput", "fnmatch", "fractions", "functools", "getopt",
    "getpass", "gettext", "glob", "gzip", "heapq", "hmac", "html", "http.cookies", "inspect", "ipaddress", "json",
    "keyword", "linecache", "locale", "mimetypes", "netrc", "ntpath", "numbers", "opcode", "operator", "optparse", "os",
    "pdb", "pickle", "pkgutil", "platform", "plistlib", "posixpath", "pprint", "profile", "quopri", "random", "reprlib",
    "sched", "secrets", "shelve", "shlex", "shutil", "site", "socket", "stat", "statistics", "string", "subprocess",
    "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "timeit", "token", "tokenize", "trace", "traceback",
    "types", "urllib.parse", "uuid", "warnings", "wave", "weakref", "zipfile",
)  # fmt: skip
READ_LINES, READ_CHARACTERS = range(3, 13), 320
RUN_CHARACTERS = 500

_WORDS = ("alpha", "beta", "gamma", "delta", "omega", "river", "stone", "light", "copper", "maple", "north", "winter")
_Values = Callable[[random.Random], tuple[Any, ...]]


def words(rng: random.Random, least: int, most: int) -> list[str]:
    """`least` to `most` common words, with repetitions."""
    return rng.choices(_WORDS, k=rng.randint(least, most))


def numbers(rng: random.Random, least: int = 3, most: int = 7) -> list[int]:
    """`least` to `most` integers from 0 to 99."""
    return [rng.randint(0, 99) for _ in range(rng.randint(least, most))]


def _path(rng: random.Random) -> str:
    return "/" * rng.randint(0, 1) + "/".join(words(rng, 1, 3)) + rng.choice(["", ".py", ".tar.gz", ".txt"])


def _shares(rng: random.Random) -> tuple[float, ...]:
    return tuple(rng.randint(0, 10) / 10 for _ in range(3))


def _quoted(rng: random.Random) -> str:
    return rng.choice(['"', "<", "&", " ", "'"]).join(words(rng, 2, 3))


# Functions that can be called, each with a function that samples its arguments. Those that the running Python lacks are
# left out.
_CALLABLE: dict[str, _Values] = {
    "calendar.isleap": lambda rng: (rng.randint(1582, 2400),),
    "calendar.leapdays": lambda rng: (rng.randint(1600, 1999), rng.randint(2000, 2400)),
    "colorsys.rgb_to_yiq": _shares,
    "colorsys.rgb_to_hls": _shares,
    "colorsys.rgb_to_hsv": _shares,
    "colorsys.hsv_to_rgb": _shares,
    "bisect.bisect_left": lambda rng: (sorted(numbers(rng)), rng.randint(0, 99)),
    "bisect.bisect_right": lambda rng: (sorted(numbers(rng)), rng.randint(0, 99)),
    "operator.countOf": lambda rng: (words(rng, 4, 8), rng.choice(_WORDS)),
    "operator.concat": lambda rng: (words(rng, 1, 3), words(rng, 1, 3)),
    "operator.sub": lambda rng: (rng.randint(0, 999), rng.randint(0, 999)),
    "operator.xor": lambda rng: (rng.randint(0, 255), rng.randint(0, 255)),
    "operator.mod": lambda rng: (rng.randint(0, 999), rng.randint(2, 30)),
    "string.capwords": lambda rng: (" ".join(words(rng, 2, 5)),),
    "textwrap.indent": lambda rng: ("\n".join(words(rng, 2, 4)) + "\n", rng.choice(["  ", "> ", "# "])),
    "posixpath.basename": lambda rng: (_path(rng),),
    "posixpath.dirname": lambda rng: (_path(rng),),
    "posixpath.split": lambda rng: (_path(rng),),
    "posixpath.isabs": lambda rng: (_path(rng),),
    "posixpath.join": lambda rng: (_path(rng), _path(rng)),
    "genericpath.commonprefix": lambda rng: ([stem := rng.choice(_WORDS)[:3], stem + "a", stem + rng.choice(_WORDS)],),
    "html.escape": lambda rng: (_quoted(rng),),
    "shlex.quote": lambda rng: (_quoted(rng),),
    "statistics.median": lambda rng: (numbers(rng),),
    "statistics.median_low": lambda rng: (numbers(rng),),
    "statistics.median_high": lambda rng: (numbers(rng),),
    "email.utils.unquote": lambda rng: (f'"{_quoted(rng)}"',),
    "timeit.reindent": lambda rng: ("\n".join(words(rng, 2, 3)), rng.randint(1, 8)),
    "urllib.parse.unwrap": lambda rng: (f"<URL:https://{'.'.join(words(rng, 1, 2))}.org>",),
    "xml.sax.saxutils.escape": lambda rng: (_quoted(rng),),
    "tokenize.group": lambda rng: tuple(words(rng, 1, 4)),
    "ipaddress._count_righthand_zero_bits": lambda rng: (rng.randint(1, 4096), rng.randint(4, 32)),
    "inspect.indentsize": lambda rng: (" " * rng.randint(0, 9) + rng.choice(_WORDS),),
    "heapq.heappush": lambda rng: (sorted(numbers(rng)), rng.randint(0, 99)),
    "quopri.unhex": lambda rng: (f"{rng.randint(16, 255):X}".encode(),),
}


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A function's source with the definitions of its module that it needs, its name, and its origin
    (`stdlib:MODULE.NAME`)."""

    code: str
    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Broken:
    """A snippet in which one line was changed, with the number of the line and its text now and before."""

    code: str
    line: int
    now: str
    before: str


def draw_function(rng: random.Random) -> Snippet:
    """Samples a short function for reading."""
    return rng.choice(_functions())


def draw_callable(rng: random.Random) -> tuple[Snippet, str, Any]:
    """Samples a function to run and a call of it, and returns both with the value of the call."""
    name = rng.choice(_callables())
    snippet = _sliced(name)
    arguments = _CALLABLE[name](rng)
    call = f"{snippet.name}({', '.join(map(repr, arguments))})"
    module, _, function = name.rpartition(".")
    value = getattr(importlib.import_module(module), function)(*arguments)
    return snippet, call, value


def break_snippet(snippet: Snippet, rng: random.Random) -> Broken:
    """Makes one typical mistake: a misspelt name or attribute, a missing colon, a number in quotes."""
    changes = _changes(snippet)
    row, start, stop, text = changes[rng.randrange(len(changes))]
    lines = snippet.code.split("\n")
    before = lines[row]
    lines[row] = before[:start] + text + before[stop:]
    return Broken("\n".join(lines), row + 1, lines[row].strip(), before.strip())


def _changes(snippet: Snippet) -> list[tuple[int, int, int, str]]:
    """Every possible single mistake in the function itself, as (row, start, stop, new text)."""
    tree, found = ast.parse(snippet.code), []
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == snippet.name)
    lines = snippet.code.split("\n")
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.lineno != function.lineno:
            found.append((node.lineno - 1, node.col_offset, node.end_col_offset or 0, _misspelt(node.id)))
        elif isinstance(node, ast.Attribute) and (end := node.end_col_offset) and node.lineno == node.end_lineno:
            found.append((node.lineno - 1, end - len(node.attr), end, _misspelt(node.attr)))
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.lineno != function.lineno:
            found.append((node.lineno - 1, node.col_offset, node.end_col_offset or 0, repr(str(node.value))))
        elif isinstance(node, ast.FunctionDef | ast.If | ast.For | ast.While):
            row = node.body[0].lineno - 2
            if lines[row].endswith(":"):
                found.append((row, len(lines[row]) - 1, len(lines[row]), ""))
    return sorted(found)


def _misspelt(name: str) -> str:
    middle = len(name) // 2
    return name[:middle] + name[middle:].replace(name[middle], name[middle] * 2, 1)


@functools.cache
def _functions() -> tuple[Snippet, ...]:
    found = []
    for module in READ:
        try:
            source = inspect.getsource(importlib.import_module(module))
        except ImportError:  # this version of Python, or this system, lacks the module
            continue
        lines = source.split("\n")  # once: ast.get_source_segment splits the whole source at every call
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 in READ_LINES:
                *before, last = lines[node.lineno - 1 : node.end_lineno]
                text = "\n".join([*before, last.encode()[: node.end_col_offset].decode()])
                if text.isascii() and len(text) <= READ_CHARACTERS and "\f" not in text:
                    found.append(Snippet(text, node.name, f"stdlib:{module}.{node.name}"))
    return tuple(found)


@functools.cache
def _callables() -> tuple[str, ...]:
    return tuple(name for name in _CALLABLE if _has(name) and len(_sliced(name).code) <= RUN_CHARACTERS)


def _has(name: str) -> bool:
    """Whether the module's own source defines the function."""
    module, _, function = name.rpartition(".")
    found = _definitions(ast.parse(inspect.getsource(importlib.import_module(module)))).get(function)
    return found is not None and isinstance(found[0], ast.FunctionDef)


@functools.cache
def _sliced(name: str) -> Snippet:
    """The function and all definitions of its module that it needs, in the order of the file, without docstrings."""
    module, _, function = name.rpartition(".")
    source = inspect.getsource(importlib.import_module(module))
    definitions = _definitions(ast.parse(source))
    needed, left = set[str](), [function]
    while left:
        current = left.pop()
        if current in definitions and current not in needed:
            needed.add(current)
            left += [node.id for node in ast.walk(definitions[current][0]) if isinstance(node, ast.Name)]
    chosen = sorted((definitions[item] for item in needed), key=lambda item: item[0].lineno)
    parts = [text or _without_docstring(source, node) for node, text in chosen]
    code = ""
    for (node, _), text in zip(chosen, parts, strict=True):
        code += "\n\n" if code and isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
        code += text + "\n"
    return Snippet(code, function, f"stdlib:{name}")


def _definitions(tree: ast.Module) -> dict[str, tuple[ast.stmt, str]]:
    """The statement at the module's top level that binds each name, with the text of an import of only this name, or ""
    where the statement is no import."""
    found: dict[str, tuple[ast.stmt, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (node, "")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = (node, "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if isinstance(node, ast.Import):
                    lone = ast.Import([alias])
                else:
                    lone = ast.ImportFrom(node.module, [alias], node.level)
                found[(alias.asname or alias.name).split(".")[0]] = (node, ast.unparse(lone))
    return found


def _without_docstring(source: str, node: ast.stmt) -> str:
    lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or len(node.body) == 1:
        return "\n".join(lines)
    if ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        del lines[first.lineno - node.lineno : (first.end_lineno or 0) - node.lineno + 1]
        while not lines[first.lineno - node.lineno].strip():
            del lines[first.lineno - node.lineno]
    return "\n".join(lines)
