"""Generated conversations: real responses, right calls, many different requests, and a split that nothing straddles."""

from __future__ import annotations

import collections
import gc
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.data.conversations import snippets
from smallcoder_jax.data.conversations.generate import complete, draw
from smallcoder_jax.data.conversations.record import Record, side_of
from smallcoder_jax.data.conversations.requests import KINDS
from smallcoder_jax.tokenizers.chat import check
from smallcoder_jax.tokenizers.chat_parser import check_call
from smallcoder_jax.toolbox import functions

COUNT = 1000


def execute(name: str, arguments: dict[str, Any]) -> str:
    """Runs the generator's own programs; what a model writes needs isolation."""
    command = {"execute_python": [sys.executable, "-I", "-c"], "execute_bash": ["bash", "-c"]}[name]
    (program,) = arguments.values()
    done = subprocess.run([*command, program], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def drafts() -> list[Any]:
    return [draw(0, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def records(drafts: list[Any]) -> list[Record]:
    """At least five of every kind."""
    chosen = [draft for kind in KINDS for draft in [draft for draft in drafts if draft.kind == kind][:5]]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda draft: complete(draft, execute), chosen))


def test_requests_differ_and_every_tool_is_asked_for(drafts: list[Any]) -> None:
    requests = {" ".join(draft.plan.request.casefold().split()) for draft in drafts}
    assert len(requests) > 0.97 * COUNT
    for name in functions.TOOLS:
        assert sum(name in draft.plan.tools for draft in drafts) >= 0.1 * COUNT, name
    kinds = collections.Counter(draft.kind for draft in drafts)
    for kind, (_, share) in KINDS.items():
        assert 0.7 * share < kinds[kind] / COUNT < 1.4 * share, kind
    assert sum(share for _, share in KINDS.values()) == pytest.approx(1)


def test_the_tools_that_are_needed_are_on_offer_among_others(drafts: list[Any]) -> None:
    places = collections.Counter()
    for draft in drafts:
        assert set(draft.plan.tools) < set(draft.tools)
        if draft.plan.tools:
            places[draft.tools.index(draft.plan.tools[0])] += 1
    assert min(places[0], places[1]) > 0.25 * COUNT


def test_no_request_is_on_both_sides() -> None:
    sides: dict[str, set[str]] = {}
    for seed in (0, 1):
        for index in range(COUNT):
            draft = draw(seed, index)
            sides.setdefault(" ".join(draft.plan.request.casefold().split()), set()).add(draft.side)
    assert all(len(found) == 1 for found in sides.values())
    assert len(sides) < 2 * COUNT, "this test needs requests that occur twice"
    share = sum(found == {"validation"} for found in sides.values()) / len(sides)
    assert 0.07 < share < 0.13
    for number in range(200):
        assert side_of(f"What  is {number}?\n") == side_of(f"what is {number}? ")


@pytest.mark.slow
def test_a_conversation_depends_on_seed_and_index_alone(records: list[Record]) -> None:
    for record in records[::4]:
        provenance = record.provenance
        assert complete(draw(provenance["seed"], provenance["index"]), execute) == record
    code = (
        "from smallcoder_jax.data.conversations.generate import draw\nimport hashlib\n"
        "drawn = [draw(3, i) for i in range(60)]\n"
        "print(hashlib.sha256(repr([(one.plan.request, one.tools) for one in drawn]).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert draw(0, 5).plan.request != draw(1, 5).plan.request


def test_records_hold(records: list[Record]) -> None:
    for record in records:
        messages = record.conversation.messages
        check(record.conversation)
        offered = {tool["function"]["name"]: tool["function"] for tool in record.conversation.tools}
        for message in messages:
            for call in message.tool_calls:
                assert check_call(call, offered) == []
        assert messages[-1].role == "assistant"
        assert messages[-1].content
        assert not messages[-1].tool_calls
        assert all("\x00" not in message.content and " at 0x" not in message.content for message in messages)
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
        assert set(record.provenance) == {"generator", "seed", "index", "kind", "source", "python"}


def of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.provenance["kind"] == kind]


def test_responses_are_real_and_used(records: list[Record]) -> None:
    for record in of_kind(records, "execute_python"):
        call, response, answer = record.conversation.messages[-3:]
        (made,) = call.tool_calls
        assert response.content == execute("execute_python", made.arguments).rstrip("\n")
        assert "Traceback" not in response.content
        assert response.content in answer.content
    for record in of_kind(records, "execute_bash"):
        assert record.conversation.messages[-2].content in record.conversation.messages[-1].content
        assert "not found" not in record.conversation.messages[-2].content
    for record in of_kind(records, "run_tests"):
        assert record.conversation.messages[-2].content.endswith("failed")
    assert any("should read" in record.conversation.messages[-1].content for record in of_kind(records, "debug_code"))
    for record in of_kind(records, "two_turns"):
        first, second = [message for message in record.conversation.messages if message.tool_calls]
        assert first.tool_calls[0].name != second.tool_calls[0].name
    for record in of_kind(records, "two_at_once"):
        assert len(record.conversation.messages[-4].tool_calls) == 2
    for record in of_kind(records, "no_call"):
        assert not any(message.tool_calls for message in record.conversation.messages)


def test_sliced_functions_do_what_the_library_does() -> None:
    """A function cut out with what it needs gives the library's values."""
    import random

    rng = random.Random(2)
    drawn = {}
    while len(drawn) < len(snippets._callables()):
        snippet, call, value = snippets.draw_callable(rng)
        drawn[snippet.source] = (snippet, call, value)
    for snippet, call, value in drawn.values():
        space: dict[str, Any] = {"__name__": "code"}
        exec(snippet.code, space)  # the library's own code
        assert eval(call, space) == value, call
        broken = snippets.break_snippet(snippet, rng)
        changed = [a for a, b in zip(broken.code.split("\n"), snippet.code.split("\n"), strict=True) if a != b]
        assert [line.strip() for line in changed] == [broken.now]
    assert len(drawn) > 25


def test_a_test_run_and_a_traceback() -> None:
    code = "def f(x):\n    return x + 1"
    tests = "assert f(1) == 2\nassert f(2) == 4\nassert f('a') == 2"
    assert functions.call_tool("run_tests", {"code": code, "tests": tests}, execute).splitlines() == [
        "FAILED assert f(2) == 4 (got 3)",
        "FAILED assert f('a') == 2 (TypeError: can only concatenate str (not \"int\") to str)",
        "1 passed, 2 failed",
    ]
    found = functions.call_tool("debug_code", {"code": code.replace("x + 1", "y") + "\n\nprint(f(1))"}, execute)
    assert found.splitlines()[-1] == "NameError: name 'y' is not defined"
    assert 'File "code.py", line 2, in f\n    return y' in found
    assert "<string>" not in found
    long = functions.call_tool("execute_python", {"code": "print('x' * 1300)"}, execute)
    assert long == "x" * 1200 + "\n[100 more characters]"


def test_documentation_does_not_depend_on_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run sets one, pytest another: the conversations of a seed would be others beside them."""
    functions.documentation.cache_clear()
    found = functions.documentation()
    assert "sys.exit" in found
    assert "sys.unraisablehook" not in found
    functions.documentation.cache_clear()
    for name in ("unraisablehook", "displayhook"):
        monkeypatch.setattr(sys, name, lambda found: None)
    assert functions.documentation() == found


def test_analysis_and_search() -> None:
    code = "import os.path, re\nfrom a import b\ndef f(a, *, b=1):\n    if a and b: return g(os.x(1))\n"
    code += "    return [i for i in a]"
    assert functions.analyze(code, "functions") == {"functions": ["f(a, *, b=1)"]}
    assert functions.analyze(code, "imports") == {"imports": ["os.path", "re", "a"]}
    assert functions.analyze(code, "calls") == {"calls": ["g", "os.x"]}
    assert functions.analyze(code, "complexity") == {"complexity": 4}
    best, second = functions.search("push item onto heap, maintaining the heap invariant", 2)
    assert best.startswith("heapq.heappush(heap, item")
    assert second != best
    assert functions.search("textwrap.shorten", 1)[0].startswith("textwrap.shorten(text, width")
    assert functions.search("qqq zzz", 3) == []


def test_a_record_of_something_else_is_refused(records: list[Record]) -> None:
    value = records[0].to_json()
    del value["side"]
    with pytest.raises(UserError, match="has no 'side'"):
        Record.from_json(value)


def test_code_is_analyzed_by_several_threads_at_once() -> None:
    """Also where the garbage collector, which calls Python code under jax, lets another thread in half way."""
    code = "\n".join(
        f"def f{number}(x):\n    return [y + {number} for y in (x, x * 2) if y > 0]" for number in range(20)
    )

    def let_another_in(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    thresholds = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(let_another_in)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: functions.analyze(code, "calls"), range(40)))
    finally:
        gc.callbacks.remove(let_another_in)
        gc.set_threshold(*thresholds)
    assert found == [found[0]] * 40
