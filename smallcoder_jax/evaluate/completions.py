"""Whether what a model writes is Python: greedy completions of held-out files, parsed and looked at for repetition."""

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
PROMPT_CHARACTERS = 1200  # of a prefix's end, which are what the model is shown
ROUNDS = 20  # through all texts, while prefixes are wanted
_WARNINGS = threading.Lock()  # filters belong to the process, and `catch_warnings` puts back those that it found
REPEATED = 3  # so often the same line is a model that repeats itself


@dataclasses.dataclass(frozen=True)
class Written:
    """A completion and what is said of it: `parses`, prefix and completion without the last line, which may be cut off;
    `repeats`, a line that is not blank three times or more, its indentation aside.
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
    """Greedy completions of `count` prefixes of `texts`; fewer where there are not so many places to cut."""
    prefixes = cut(texts, count, seed)
    options = SamplingOptions(max_tokens=max_tokens, temperature=0.0, truncate_prompt=True)
    written = generator.generate([_end_of(prefix) for prefix in prefixes], options, batch_size=32) if prefixes else []
    return [judge(prefix, completion.text) for prefix, completion in zip(prefixes, written, strict=True)]


def cut(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Beginnings of texts that are Python, up to the end of a line after which they are Python as well: of each text
    one, then of each a second, until there are enough.
    """
    generator = np.random.default_rng(seed)
    pages = [io.StringIO(text).readlines() for text in texts if tree_of(text)]  # lines as Python's: by newlines alone
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
    """Whole lines from the end of a prefix."""
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
    """Whether `text` is Python, or the beginning of it that only wants more lines. Nothing is executed."""
    if tree_of(text):
        return True
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codeop.compile_command(text, symbol="exec") is None
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False


def share(written: Sequence[Written]) -> float:
    """Of `written`, those that are good; 0 where there are none."""
    return sum(one.good for one in written) / len(written) if written else 0.0


def tree_of(text: str) -> ast.Module | None:
    """The syntax tree of a text that nobody has read; None where it is no Python."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
