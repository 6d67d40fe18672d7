"""What counts as Python that a model wrote, and where held-out files are cut."""

import ast
import types
from typing import Any, cast

import pytest

from smallcoder_jax.evaluate import completions
from smallcoder_jax.evaluate.completions import cut, judge, parses, share

PREFIX = "import os\n\n\ndef first(x):\n    y = x + 1\n"


@pytest.mark.parametrize(
    ("text", "good", "why"),
    [
        ("    return y\n\n\ndef second(", True, "the last line is cut off"),
        ("    if y:\n        retur", True, "a block that only wants its body"),
        ('    """A text that goes\n    on and on\n    for', True, "a string that only wants its end"),
        ("    z = (1,\n         2,\n         3", True, "a bracket that only wants its end"),
        ("    return y)\n    x = 1\n", False, "a bracket too many"),
        ("  return y\n    return z\n", False, "an indentation that was never begun"),
        ("    return return\n    x\n", False, "no statement"),
        ("    y = 1\n    y = 1\n    y = 1\n    retur", False, "the same line three times"),
        ("    y = 1\n    z = 2\n    y = 1\n\n\n\n\n", True, "blank lines and a line said twice"),
        ("", True, "nothing"),
    ],
)
def test_what_is_good(text: str, good: bool, why: str) -> None:
    assert judge(PREFIX, text).good is good, why


def test_what_cannot_be_read_is_no_python_and_no_crash() -> None:
    assert not parses("x = '\0'\n")
    assert not parses("(" * 100_000 + "\n)" * 3 + "]\n")
    assert share([]) == 0.0
    assert share([judge(PREFIX, ""), judge(PREFIX, "    a b\n")]) == 0.5


def test_the_model_is_shown_whole_lines_of_the_end() -> None:
    class Shown:
        def generate(self, prompts: list[str], options: Any, batch_size: int) -> list[Any]:
            self.prompts = prompts
            return [types.SimpleNamespace(text="    pass\n") for _ in prompts]

    text = "def f():\n" + "".join(f"    name_{i} = {i}\n" for i in range(500))
    shown = Shown()
    written = completions.complete(cast(Any, shown), [text], count=8)
    assert len(written) == 8
    assert all(one.good for one in written)
    for prompt, one in zip(shown.prompts, written, strict=True):
        assert one.prefix.endswith(prompt)
        assert prompt.startswith(("    name_", "def f()"))
        assert len(prompt) <= completions.PROMPT_CHARACTERS


def test_files_are_cut_where_both_they_and_their_beginning_are_python() -> None:
    body = "".join(f"    value_{i} = call(\n        {i},\n    )\n" for i in range(40))
    texts = ["not python at all (\n" * 9, "x = 1\n", *(f"def f{i}():\n{body}" for i in range(60))]
    prefixes = cut(texts, 50, seed=0)
    assert len(prefixes) == 50
    assert len(set(prefixes)) == 50
    for prefix in prefixes:
        ast.parse(prefix)
        assert prefix.endswith("\n")
        assert prefix.count("\n") >= completions.FEWEST_LINES
    assert len(cut(texts[:3], 50, seed=0)) > 2  # several of one file, where there are few
    assert cut(texts[:2], 50, seed=0) == []
    assert prefixes == cut(texts, 50, seed=0)
    assert prefixes != cut(texts, 50, seed=1)


def test_a_line_ends_with_a_newline_alone() -> None:
    """Not with a form feed, nor with what else Unicode calls a line's end, which strings and comments may hold."""
    text = "".join(f"x{i} = 'a\u2028b\x85c'  # \x0cnext\n" for i in range(30))
    prefixes = cut([text], 50, seed=0)
    assert len(prefixes) > 10
    assert all(prefix.endswith("\x0cnext\n") for prefix in prefixes)
    assert judge(PREFIX, "    marks = '=\u2028=\u2028=\u2028=\u2028'\n").good
