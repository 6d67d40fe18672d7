"""A grammar of user requests (wordings x slots), each with the calls that answer it and the final answer.

All random choices use the `random.Random` that is passed, so that a request depends only on its seed.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
from collections.abc import Callable, Sequence

from smallcoder_jax.data.conversations.snippets import (
    Snippet,
    break_snippet,
    draw_callable,
    draw_function,
    numbers,
    words,
)
from smallcoder_jax.tokenizers.chat import ToolCall
from smallcoder_jax.toolbox.functions import ASPECTS, documentation

Step = Callable[[Sequence[str]], tuple[ToolCall, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request, the functions that it needs, its turns of calls (each made from the responses so far), the answer
    (made from all responses), and the source of the code or documentation in it."""

    request: str
    tools: tuple[str, ...]
    steps: tuple[Step, ...]
    answer: Callable[[Sequence[str]], str]
    source: str = "grammar"


_ASK = ("", "Please ", "Could you ", "Can you ", "I need you to ", "Now ", "Quickly ")
_THANKS = ("", "", "", " Thanks.", " Thank you!", " It is for a report.", " I want to be sure.")


def _ask(rng: random.Random, *wordings: str) -> str:
    """One of the wordings with a random beginning and end. A beginning is added only to a wording in lower case."""
    text = rng.choice(wordings)
    begin = rng.choice(_ASK) if text[0].islower() else ""
    text = begin + text + rng.choice(_THANKS)
    return text[0].upper() + text[1:]


def _once(name: str, arguments: dict[str, object]) -> Step:
    return lambda _: (ToolCall(name, arguments),)


def _block(code: str, language: str = "python") -> str:
    return f"\n```{language}\n{code.rstrip()}\n```"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(f"`{item}`" for item in items)


def _last_line(response: str) -> str:
    lines = response.splitlines()
    return lines[-1] if lines else "nothing"


def _expression(rng: random.Random) -> tuple[str, str]:
    """A quantity in words, and the Python expression that computes it."""
    a, b, c = rng.randint(2, 9999), rng.randint(2, 999), rng.randint(2, 12)
    many, names = numbers(rng), words(rng, 3, 6)
    text = " ".join(names)
    return rng.choice(
        [
            (f"{a} times {b}", f"{a} * {b}"),
            (f"{a} divided by {b}", f"{a} / {b}"),
            (f"the remainder of {a} divided by {c}", f"{a} % {c}"),
            (f"{c} to the power of {c + 3}", f"{c} ** {c + 3}"),
            (f"the sum of {many}", f"sum({many})"),
            (f"the largest number in {many}", f"max({many})"),
            (f"{many} in ascending order", f"sorted({many})"),
            (f"the squares of {many}", f"[n ** 2 for n in {many}]"),
            (f"the even numbers in {many}", f"[n for n in {many} if n % 2 == 0]"),
            (f"{text!r} reversed", f"{text!r}[::-1]"),
            (f"the number of characters in {text!r}", f"len({text!r})"),
            (f"the different words of {names}, sorted", f"sorted(set({names}))"),
            (f"how often 'a' occurs in {text!r}", f"{text!r}.count('a')"),
            (f"{a} in binary", f"bin({a})"),
            (f"{a} in hexadecimal", f"hex({a})"),
        ]
    )


def execute_python(rng: random.Random) -> Plan:
    """A request to compute an expression, or to run real code."""
    if rng.random() < 0.7:
        wanted, expression = _expression(rng)
        request = _ask(
            rng, f"compute {wanted}.", f"What is {wanted}?", f"tell me {wanted}.", f"use Python for {wanted}."
        )
        call = _once("execute_python", {"code": f"print({expression})"})
        said = rng.choice(["The result is {}.", "{}.", "It is {}.", f"`{expression}` gives {{}}."])
        return Plan(request, ("execute_python",), (call,), lambda found: said.format(found[-1]))
    snippet, value, _ = draw_callable(rng)
    code = f"{snippet.code}\n\nprint({value})"
    request = _ask(rng, "run this code.", "What does this print?", "execute this and show me the output.") + _block(
        code
    )
    call = _once("execute_python", {"code": code})
    return Plan(
        request, ("execute_python",), (call,), lambda found: f"It prints:{_block(found[-1], '')}", snippet.source
    )


def execute_bash(rng: random.Random) -> Plan:
    """A request for a shell command that processes text or numbers given in the request."""
    names, many = words(rng, 3, 7), numbers(rng)
    text, first, last, step = " ".join(names), rng.randint(1, 20), rng.randint(30, 90), rng.randint(2, 9)
    lines, echo = "printf '%s\\n' ", f"echo {shlex.quote(text)}"
    wanted, command = rng.choice(
        [
            (f"count the words in '{text}'", f"{echo} | wc -w"),
            (f"count the characters in '{text}'", f"printf %s {shlex.quote(text)} | wc -m"),
            (f"write '{text}' in capitals", f"{echo} | tr a-z A-Z"),
            (f"sort the words {', '.join(names)}", f"{lines}{' '.join(names)} | sort"),
            (f"sort the words {', '.join(names)} backwards", f"{lines}{' '.join(names)} | sort -r"),
            (f"list the different words of {', '.join(names)}", f"{lines}{' '.join(names)} | sort -u"),
            (f"sort the numbers {', '.join(map(str, many))}", f"{lines}{' '.join(map(str, many))} | sort -n"),
            (f"list the numbers from {first} to {last} in steps of {step}", f"seq {first} {step} {last}"),
            (f"show the last {step} numbers from {first} to {last}", f"seq {first} {last} | tail -n {step}"),
            (f"replace every a by {step} in '{text}'", f"{echo} | sed s/a/{step}/g"),
            (f"show the first {step} letters of '{text}'", f"{echo} | cut -c 1-{step}"),
        ]
    )
    request = _ask(rng, f"{wanted} in the shell.", f"use bash to {wanted}.", f"{wanted} with a shell command.")
    call = _once("execute_bash", {"command": command})
    said = rng.choice(["The shell says:", "The output is:", f"`{command}` prints:"])
    return Plan(request, ("execute_bash",), (call,), lambda found: said + _block(found[-1], ""))


def search_docs(rng: random.Random) -> Plan:
    """A request to look up a function by its name, or by what it does."""
    name, (line, _) = rng.choice(list(documentation().items()))
    does = line.rpartition("): ")[2].rstrip(".")
    limit = rng.randint(2, 4)
    if rng.random() < 0.5:
        query = name
        wordings = (f"What does {name} do?", f"look up {name} in the documentation.", f"explain {name} from the docs.")
    else:
        query = does[0].lower() + does[1:]
        wordings = (
            f"Which function of the standard library does this: {query}?",
            f"find me something in the standard library to {query}.",
            f"search the docs for: {query}.",
        )
    arguments: dict[str, object] = {"query": query}
    request = _ask(rng, *wordings)
    if rng.random() < 0.3:
        request += f" Give me {limit} results."
        arguments["limit"] = limit

    def answer(found: Sequence[str]) -> str:
        entries = found[-1].splitlines()
        if len(entries) == 1:
            return f"From the documentation: {entries[0]}"
        return "From the documentation:\n" + "\n".join(f"- {entry}" for entry in entries)

    return Plan(request, ("search_docs",), (_once("search_docs", arguments),), answer, f"stdlib:{name}")


_ASPECT_WORDINGS = {
    "functions": ("Which functions does this code define?", "list the functions in this code with their arguments."),
    "imports": ("Which modules does this code import?", "list the imports of this code."),
    "calls": ("What does this code call?", "list everything that this code calls."),
    "complexity": ("How complex is this code?", "measure the cyclomatic complexity of this code."),
}


def _describe(response: str) -> str:
    """The result of an analysis in words."""
    ((aspect, found),) = json.loads(response).items()
    if aspect == "complexity":
        return f"Its cyclomatic complexity is {found}."
    verb = {"functions": "defines", "imports": "imports", "calls": "calls"}[aspect]
    return f"It {verb} {_listed(found)}." if found else f"It {verb} nothing."


def analyze_code(rng: random.Random) -> Plan:
    """A request to analyse one aspect of a real function."""
    aspect = rng.choice(ASPECTS)
    snippet = draw_function(rng) if aspect != "imports" or rng.random() < 0.3 else draw_callable(rng)[0]
    request = _ask(rng, *_ASPECT_WORDINGS[aspect]) + _block(snippet.code)
    call = _once("analyze_code", {"code": snippet.code.rstrip(), "aspect": aspect})
    return Plan(request, ("analyze_code",), (call,), lambda found: _describe(found[-1]), snippet.source)


def _tests(snippet: Snippet, rng: random.Random) -> str:
    """Two assertions on values that the real function returns. Each is wrong on purpose with probability 1/3."""
    tests = []
    while len(tests) < 2:
        other, call, value = draw_callable(rng)
        if other == snippet:
            wrong = rng.random() < 1 / 3
            tests.append(f"assert {call} == {_another(value) if wrong else value!r}")
    return "\n".join(tests)


def _another(value: object) -> object:
    """Another value, to be formatted into the source of an assertion."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else repr([value])


def run_tests(rng: random.Random) -> Plan:
    """A request to test a real function."""
    snippet = draw_callable(rng)[0]
    tests, code = _tests(snippet, rng), snippet.code.rstrip()
    begin = _ask(
        rng, "run these tests.", "Do the tests pass?", f"test {snippet.name}.", "check this code with its tests."
    )
    request = f"{begin}{_block(code)}\nTests:{_block(tests)}"

    def answer(found: Sequence[str]) -> str:
        failed = [line for line in found[-1].splitlines() if line.startswith("FAILED ")]
        if not failed:
            return f"All tests pass: {_last_line(found[-1])}."
        return f"{_last_line(found[-1])}:\n" + "\n".join(f"- {line.removeprefix('FAILED ')}" for line in failed)

    call = _once("run_tests", {"code": code, "tests": tests})
    return Plan(request, ("run_tests",), (call,), answer, snippet.source)


def debug_code(rng: random.Random) -> Plan:
    """A request to debug a real function with one mistake in it."""
    snippet, call, _ = draw_callable(rng)
    broken = break_snippet(snippet, rng)
    code = f"{broken.code}\n\nprint({call})"
    request = _ask(rng, "Why does this fail?", "find the bug in this code.", "This code is broken.", "debug this.")

    def answer(found: Sequence[str]) -> str:
        if not found[-1].startswith(("Traceback", "  File")):
            return f"With these arguments it runs without an error and prints `{found[-1]}`."
        fix = f"Line {broken.line} reads `{broken.now}` and should read `{broken.before}`."
        return f"It raises {_last_line(found[-1])}. {fix}"

    step = _once("debug_code", {"code": code})
    return Plan(request + _block(code), ("debug_code",), (step,), answer, snippet.source)


def two_turns(rng: random.Random) -> Plan:
    """A request for two calls in two turns: the second needs the first one's response, or answers a second question."""
    if rng.random() < 0.5:
        many, factor = numbers(rng), rng.randint(2, 99)
        name, first = rng.choice([("sum", f"sum({many})"), ("maximum", f"max({many})"), ("minimum", f"min({many})")])
        request = _ask(
            rng,
            f"compute the {name} of {many}, then count up from it by {factor} in the shell and show the last 3.",
            f"take the {name} of {many} in Python; with seq, show the last 3 numbers from there to {factor} more.",
        )
        steps: tuple[Step, ...] = (
            _once("execute_python", {"code": f"print({first})"}),
            lambda found: (
                ToolCall("execute_bash", {"command": f"seq {found[0]} $(({found[0]} + {factor})) | tail -n 3"}),
            ),
        )
        return Plan(
            request,
            ("execute_python", "execute_bash"),
            steps,
            lambda found: f"The {name} is {found[0]}; the last numbers are {', '.join(found[1].split())}.",
        )
    snippet, call, _ = draw_callable(rng)
    aspect = rng.choice(ASPECTS)
    code = snippet.code.rstrip()
    wording = rng.choice(_ASPECT_WORDINGS[aspect])
    request = f"{wording[0].upper()}{wording[1:]} And what does `{call}` give?{rng.choice(_THANKS)}{_block(code)}"
    steps = (
        _once("analyze_code", {"code": code, "aspect": aspect}),
        _once("execute_python", {"code": f"{code}\n\nprint({call})"}),
    )
    return Plan(
        request,
        ("analyze_code", "execute_python"),
        steps,
        lambda found: f"{_describe(found[0])} `{call}` gives:{_block(found[1], '')}",
        snippet.source,
    )


def two_at_once(rng: random.Random) -> Plan:
    """A request for two independent calls in one turn."""
    (one, first), (two, second) = _expression(rng), _expression(rng)
    request = _ask(rng, f"compute {one} and {two}.", f"What are {one} and {two}?", f"tell me both {one} and {two}.")

    def calls(_: Sequence[str]) -> tuple[ToolCall, ...]:
        return tuple(ToolCall("execute_python", {"code": f"print({item})"}) for item in (first, second))

    return Plan(request, ("execute_python",), (calls,), lambda found: f"They are {found[0]} and {found[1]}.")


def no_call(rng: random.Random) -> Plan:
    """A request that can be answered without a call."""
    name, n, names = "_".join(words(rng, 1, 2)), rng.randint(2, 999), words(rng, 2, 4)
    wanted, code = rng.choice(
        [
            (f"a function {name} that adds {n} to a number", f"def {name}(x):\n    return x + {n}"),
            (f"a function {name} that repeats a text {n} times", f"def {name}(text):\n    return text * {n}"),
            (f"a loop that prints the numbers below {n}", f"for i in range({n}):\n    print(i)"),
            (f"a class {name.title()} that holds a value", f"class {name.title()}:\n    def __init__(self, value):\n"
                                                           "        self.value = value"),
            (f"a list of {', '.join(names)}", f"{name} = {names}"),
            (f"a check that {name} is larger than {n}", f"if {name} > {n}:\n    print({name!r})"),
        ]
    )  # fmt: skip
    if rng.random() < 0.1:
        greeting = rng.choice(["Hello!", "Hi.", "Good morning.", "Hey there!"])
        return Plan(f"{greeting} I am {rng.choice(names).title()}.", (), (), lambda _: "Hello! What shall I do?")
    request = _ask(rng, f"write {wanted}.", f"show me {wanted}, do not run it.", f"How do I write {wanted}?")
    return Plan(request, (), (), lambda _: f"Like this:{_block(code)}")


# Each kind of request, and its share of all requests.
KINDS: dict[str, tuple[Callable[[random.Random], Plan], float]] = {
    "execute_python": (execute_python, 0.11),
    "execute_bash": (execute_bash, 0.13),
    "search_docs": (search_docs, 0.14),
    "analyze_code": (analyze_code, 0.13),
    "run_tests": (run_tests, 0.13),
    "debug_code": (debug_code, 0.13),
    "two_turns": (two_turns, 0.08),
    "two_at_once": (two_at_once, 0.05),
    "no_call": (no_call, 0.10),
}
