"""Checks whether a model writes valid Python: parses greedy completions of held-out files, and detects repetition."""

from __future__ import annotations

import ast
import codeop
import collections
import dataclasses
import io
import threading
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from smallcoder_jax.generate.engine import Generator
from smallcoder_jax.generate.sampling import SamplingOptions

FEWEST_LINES = 5  # of a prefix
PROMPT_CHARACTERS = 1200  # from the end of a prefix, which the model gets as its prompt
ROUNDS = 20  # at most, through all texts to find enough prefixes
_WARNINGS = threading.Lock()  # `catch_warnings` changes the filters of the whole process
REPEATED = 3  # occurrences of the same line from which a model counts as repeating itself


@dataclasses.dataclass(frozen=True)
class Written:
    """A completion and its checks.

    `parses`: the prefix and the completion, without its last line, which may be cut off, are valid Python. `repeats`: a
    non-blank line occurs three times or more, regardless of its indentation.
    """

    prefix: str
    text: str
    parses: bool
    repeats: bool

    @property
    def good(self) -> bool:
        return self.parses and not self.repeats


def complete(
    generator: Generator, texts: Iterable[str], *, count: int = 50, max_tokens: int = 60, seed: int = 0
) -> list[Written]:
    """Greedy completions of `count` prefixes of `texts`, or fewer when there are not enough places to cut."""
    prefixes = cut(texts, count, seed)
    options = SamplingOptions(max_tokens=max_tokens, temperature=0.0, truncate_prompt=True)
    written = generator.generate([_end_of(prefix) for prefix in prefixes], options, batch_size=32) if prefixes else []
    return [judge(prefix, completion.text) for prefix, completion in zip(prefixes, written, strict=True)]


def cut(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Prefixes of texts that are valid Python, cut at the end of a line so that the prefix is valid Python too.

    Each text gives one prefix, then each a second one, and so on until there are `count`.
    """
    generator = np.random.default_rng(seed)
    pages = [io.StringIO(text).readlines() for text in texts if tree_of(text)]  # split at newlines only, like Python
    pages = [lines for lines in pages if len(lines) > FEWEST_LINES]
    found: dict[str, None] = {}
    for _ in range(ROUNDS):
        for lines in pages:
            if len(found) == count:
                return list(found)
            prefix = "".join(lines[: generator.integers(FEWEST_LINES, len(lines))])
            if tree_of(prefix) and prefix.strip():
                found[prefix] = None
    return list(found)


def _end_of(prefix: str) -> str:
    """The whole lines at the end of a prefix that the model gets as its prompt."""
    if len(prefix) <= PROMPT_CHARACTERS:
        return prefix
    end = prefix[-PROMPT_CHARACTERS:]
    return end[end.find("\n", 0, -1) + 1 :]


def judge(prefix: str, text: str) -> Written:
    whole = prefix + text
    lines = [line.strip() for line in text.split("\n")]
    most = max(collections.Counter(line for line in lines if line).values(), default=0)
    return Written(prefix, text, parses(whole[: whole.rfind("\n") + 1]), most >= REPEATED)


def parses(text: str) -> bool:
    """Whether `text` is valid Python, or would be if more lines followed. Nothing is executed."""
    if tree_of(text):
        return True
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codeop.compile_command(text, symbol="exec") is None
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False


def share(written: Sequence[Written]) -> float:
    """The share of `written` that is good; 0 when it is empty."""
    return sum(one.good for one in written) / len(written) if written else 0.0


def tree_of(text: str) -> ast.Module | None:
    """The syntax tree of an untrusted text; None when it is not valid Python."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
