"""Preferences: rejected answers that are wrong in the one way that is recorded, and two sides that share no prompt."""

from __future__ import annotations

import ast
import collections
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import DataConfig, PreferencesConfig
from smallcoder_jax.data.conversations.record import side_of
from smallcoder_jax.data.corpus.corpus import corpus_key, ensure_corpus, read_split
from smallcoder_jax.data.preferences import code
from smallcoder_jax.data.preferences.calls import call_pairs
from smallcoder_jax.data.preferences.code import code_pairs, functions_of
from smallcoder_jax.data.preferences.given import preference_of
from smallcoder_jax.data.preferences.pair import (
    Preference,
    Reply,
    prompt_words,
    read_preferences,
    separate,
    write_preferences,
)
from smallcoder_jax.data.preferences.store import ensure_preferences, parse_preference_sources
from smallcoder_jax.data.sources.document import Document
from smallcoder_jax.data.sources.spec import parse_sources
from smallcoder_jax.tokenizers.chat import Conversation, Message, ToolCall, from_json
from smallcoder_jax.tokenizers.chat_parser import check_call

CODE = '''\
import math


def area(radius, scale=2):
    """The area."""
    square = radius * radius  # a comment
    if square > 10 and scale != 3:
        return math.pi * square
    total = square + scale
    return total


class Store:
    @property
    def size(self):
        return len(self.items) - 1

    async def find(self, key,
                   default=None):
        # where it may be
        found = self.items.get(key, default)
        if found is not None and not found.gone:
            self.hits += 1
            return found
        for item in (1, 2):
            text = f"{item} in {key}"
            self.log(text, True)
        return default

    def short(self): return 1

    def empty(self):
        """Nothing."""

    def other(self):
        text = """
not indented"""
        return text
'''


def document(text: str, path: str = "a.py") -> Document:
    return Document(text, "test", path, language="python")


@pytest.fixture(scope="module")
def pairs() -> list[Preference]:
    found = []
    for seed in range(30):
        found += code_pairs([document(CODE), document("not Python (")], count=100, seed=seed)
    return found


def test_prompts_and_bodies_are_those_of_the_document(pairs: list[Preference]) -> None:
    functions = {function.name: function for function in functions_of(document(CODE))}
    assert set(functions) == {"area", "size", "find"}
    assert functions["area"].prompt == 'def area(radius, scale=2):\n    """The area."""\n'
    assert functions["area"].body.startswith("    square = radius * radius  # a comment\n")
    assert functions["area"].body.endswith("    return total\n")
    assert functions["size"].text == "def size(self):\n    return len(self.items) - 1\n"
    assert functions["find"].prompt.count("\n") == 3
    assert {(pair.prompt, pair.chosen) for pair in pairs} == {(f.prompt, f.body) for f in functions.values()}
    for pair in pairs:
        assert pair.provenance["name"] in functions
        assert pair.provenance["path"] == "a.py"
        assert pair.provenance["document"] == document(CODE).hash


def names_of(tree: ast.Module) -> list[str]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [node.id for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def test_a_rejected_body_is_wrong_in_few_places(pairs: list[Preference]) -> None:
    seen = collections.Counter(pair.criteria for pair in pairs)
    assert set(seen) == set(code.CRITERIA)
    for pair in pairs:
        assert isinstance(pair.prompt, str)
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        assert pair.rejected != pair.chosen
        if pair.criteria == "truncated":
            assert pair.chosen.startswith(pair.rejected)
            assert pair.rejected.strip()
            assert pair.chosen[len(pair.rejected) :].strip()
            continue
        true, spoilt = (ast.parse(pair.prompt + body) for body in (pair.chosen, pair.rejected))
        assert ast.dump(true) != ast.dump(spoilt)
        if pair.criteria == "order":
            assert sorted(pair.rejected.splitlines()) == sorted(pair.chosen.splitlines())
            continue
        changed = [(a, b) for a, b in zip(pair.chosen.split("\n"), pair.rejected.split("\n"), strict=True) if a != b]
        assert 1 <= len(changed) <= 3
        assert 1 <= pair.reason.count(";") + 1 <= 3
        kinds = [[type(node) for node in ast.walk(tree)] for tree in (true, spoilt)]
        if pair.criteria in ("constant", "name"):
            assert kinds[0] == kinds[1]
        values = [
            sorted(repr(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)) for tree in (true, spoilt)
        ]
        names = [names_of(tree) for tree in (true, spoilt)]
        assert (values[0] != values[1]) == (pair.criteria == "constant")
        wrong = sum(a != b for a, b in zip(*names, strict=True))
        assert 1 <= wrong <= 3 if pair.criteria == "name" else wrong == 0
        assert "`" in pair.reason


def test_a_swapped_statement_was_needed_by_the_one_before(pairs: list[Preference]) -> None:
    reasons = {pair.reason for pair in pairs if pair.criteria == "order"}
    assert "`return total` stands before `total = square + scale`" in reasons
    assert "`return found` stands before `self.hits += 1`" in reasons
    independent = "def f(x):\n    a = 1\n    b = 2\n    for i in x:\n        print(i)\n"
    assert all(pair.criteria != "order" for pair in code_pairs([document(independent)], count=9, seed=0))


def test_one_pair_of_every_function_comes_first_and_seeds_differ() -> None:
    documents = [document(f"def f{i}(x):\n    y = x + {i}\n    return y\n", f"{i}.py") for i in range(20)]
    first = list(code_pairs(documents, count=20, seed=1))
    assert len({pair.prompt for pair in first}) == 20
    more = list(code_pairs(documents, count=50, seed=1))
    assert more[:20] == first
    assert len({(pair.prompt, pair.criteria) for pair in more}) == len(more) == 50
    assert list(code_pairs(documents, count=20, seed=1)) == first
    assert list(code_pairs(documents, count=20, seed=2)) != first
    assert len({pair.prompt for pair in code_pairs([*documents, *documents], count=40, seed=1)}) == 20


@pytest.fixture(scope="module")
def calls() -> list[Preference]:
    return list(call_pairs("train", count=150, seed=4))


def test_rejected_turns_have_the_mistake_that_is_recorded(calls: list[Preference]) -> None:
    seen = collections.Counter(pair.criteria for pair in calls)
    assert set(seen) == {"tool", "argument", "missing_argument", "malformed", "no_call", "needless_call"}
    for pair in calls:
        assert isinstance(pair.prompt, Conversation)
        assert isinstance(pair.chosen, Reply)
        assert isinstance(pair.rejected, Reply)
        assert pair.prompt.messages[-1].role == "user"
        assert side_of(pair.prompt.messages[-1].content) == "train"
        offered = {tool["function"]["name"]: tool["function"] for tool in pair.prompt.tools}
        wanted = [ToolCall(**from_json(call)) for call in pair.chosen.calls]
        assert all(check_call(call, offered) == [] for call in wanted)
        if pair.criteria == "needless_call":
            assert pair.chosen.content
            assert not wanted
            assert pair.rejected.calls
        else:
            assert wanted
            assert not pair.chosen.content
        if pair.criteria == "no_call":
            assert len(pair.rejected.calls) < len(wanted)
            assert pair.rejected.calls or pair.rejected.content
            continue
        if pair.criteria == "needless_call":
            assert check_call(ToolCall(**from_json(pair.rejected.calls[0])), offered) == []
            continue
        assert len(pair.rejected.calls) == len(wanted)
        ((before, after),) = [
            pair for pair in zip(pair.chosen.calls, pair.rejected.calls, strict=True) if pair[0] != pair[1]
        ]
        if pair.criteria == "malformed":
            with pytest.raises(ValueError, match=r".+"):
                from_json(after)
            continue
        true, wrong = ToolCall(**from_json(before)), ToolCall(**from_json(after))
        errors = [kind for kind, _ in check_call(wrong, offered)]
        assert errors == (["missing_argument"] if pair.criteria == "missing_argument" else [])
        assert (true.name != wrong.name) == (pair.criteria == "tool")
        if pair.criteria == "argument":
            assert sum(true.arguments[key] != wrong.arguments[key] for key in true.arguments) == 1


def test_calls_depend_on_seed_and_side_alone(calls: list[Preference]) -> None:
    assert list(call_pairs("train", count=10, seed=4)) == calls[:10]
    assert list(call_pairs("train", count=10, seed=5)) != calls[:10]
    held_out = list(call_pairs("validation", count=10, seed=4))
    assert not {prompt_words(pair.prompt) for pair in held_out} & {prompt_words(pair.prompt) for pair in calls}


def test_files_are_read_as_they_were_written(pairs: list[Preference], calls: list[Preference], tmp_path: Path) -> None:
    together = [*pairs[:20], *calls[:20], Preference("a\u2028b", "\r\n", "\n", "given")]
    write_preferences(tmp_path / "some.jsonl", together)
    assert list(read_preferences(tmp_path / "some.jsonl")) == together
    (tmp_path / "least.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n\n')
    assert list(read_preferences(tmp_path / "least.jsonl")) == [Preference("p", "c", "r", "given")]
    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    found = Preference.from_json({"prompt": asked, "chosen": "Hi.", "rejected": {"content": "", "calls": ["x"]}})
    assert (found.chosen, found.rejected) == (Reply("Hi."), Reply("", ("x",)))
    assert found.prompt == Conversation((Message("user", "Hello"),))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected an object with prompt"),
        ({"prompt": "p", "chosen": "c"}, "has no rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "have to differ"),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "rejected is 3; expected text"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "criteria": 3}, "criteria is 3"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "provenance": 3}, "provenance is 3"),
        ({"prompt": {"messages": []}, "chosen": "c", "rejected": "r"}, "no messages"),
        ({"prompt": {"messages": [{"role": "user", "content": "a"}]}, "chosen": "c", "rejected": {}}, "rejected is {}"),
        (
            {"prompt": {"messages": [{"role": "assistant", "content": "a"}]}, "chosen": "c", "rejected": "r"},
            "ends with a turn of the assistant",
        ),
    ],
)
def test_what_is_no_preference_is_refused_with_its_line(value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' + json.dumps(value))
    with pytest.raises(UserError, match=rf"bad.jsonl, line 2: .*{message}"):
        list(read_preferences(path))


def test_prompts_on_both_sides_stay_on_one() -> None:
    def pair(prompt: str, rejected: str = "r") -> Preference:
        return Preference(prompt, "c", rejected, "given")

    both = [f"prompt  {i}\n" for i in range(200)]
    sides = {
        "train": [pair(text) for text in [*both, "mine"]] + [pair("mine", "other"), pair("Mine ")],
        "validation": [pair(text.upper()) for text in [*both, "theirs"]],
    }
    found = separate(sides)
    words = {side: [prompt_words(pair.prompt) for pair in found[side]] for side in found}
    assert not set(words["train"]) & set(words["validation"])
    assert len(words["train"]) + len(words["validation"]) == 203
    assert words["train"].count("mine") == 2
    assert words["validation"].count("theirs") == 1
    assert 5 < len(words["validation"]) < 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three functions, of which one has the same signature in all."""
    root = tmp_path_factory.mktemp("preferences")
    (root / "code").mkdir()
    for i in range(60):
        text = "".join(f"def f{j}_{i}(x):\n    y = x + {i}\n    return y * {j}\n\n\n" for j in range(2))
        (root / "code" / f"{i}.py").write_text(
            text + f"def run(self):\n    value = self.{'abc'[i % 3]} + {i}\n    return value\n"
        )
    data = DataConfig(sources=f"dir:{root / 'code'}", dir=str(root), validation_fraction=0.3)
    folder = root / "corpus" / corpus_key(parse_sources(data.sources), data)
    ensure_corpus(parse_sources(data.sources), data, folder, None)
    return folder


def test_a_set_is_drawn_once_and_divided(corpus: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.jsonl"
    lines = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no", "criteria": "truth"} for i in range(100)]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = PreferencesConfig(sources=f"code, conversations,jsonl:{given}", count=90, seed=3)
    found = ensure_preferences(settings, tmp_path, corpus)
    assert not {prompt_words(p.prompt) for p in found.train} & {prompt_words(p.prompt) for p in found.validation}
    for side, pairs in (("train", found.train), ("validation", found.validation)):
        documents = {one.hash for one in read_split(corpus, side)}
        of_code = [pair for pair in pairs if "document" in pair.provenance]
        assert {pair.provenance["document"] for pair in of_code} <= documents
        accounting = json.loads((found.folder / "accounting.json").read_text())[side]
        assert accounting == dict(collections.Counter(pair.criteria for pair in pairs))
        assert side == "validation" or {"truth", "tool", "name"} <= set(accounting)
    assert sum(isinstance(pair.prompt, Conversation) for pair in found.train) == 90
    assert sum(isinstance(pair.prompt, Conversation) for pair in found.validation) == 9
    assert 70 < sum("document" in pair.provenance for pair in found.train) <= 90
    assert sum(pair.criteria == "truth" for pair in (*found.train, *found.validation)) == 100

    written = (found.folder / "train.jsonl").stat().st_mtime_ns
    assert ensure_preferences(settings, tmp_path, corpus) == found
    assert (found.folder / "train.jsonl").stat().st_mtime_ns == written
    other = ensure_preferences(dataclasses.replace(settings, seed=4), tmp_path, corpus)
    assert other.fingerprint != found.fingerprint
    given.write_text("".join(json.dumps(line) + "\n" for line in lines[:50]))
    assert ensure_preferences(settings, tmp_path, corpus).folder != found.folder


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_pairs_that_were_changed_are_refused_by_name(name: str, tmp_path: Path) -> None:
    lines = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": f"not {i}"} for i in range(40)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = PreferencesConfig(sources=f"jsonl:{tmp_path / 'given.jsonl'}")
    found = ensure_preferences(settings, tmp_path, None)
    (found.folder / name).write_text((found.folder / name).read_text().replace("not ", "no "))
    with pytest.raises(UserError, match=rf"{name} is damaged or was changed since they were made: .* Delete"):
        ensure_preferences(settings, tmp_path, None)
    (found.folder / "accounting.json").write_text(json.dumps({"files": {}, "fingerprint": found.fingerprint}))
    with pytest.raises(UserError, match="their checksums are damaged"):
        ensure_preferences(settings, tmp_path, None)


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for text in ("", "code,", "code,code", "jsonl:", "other", "jsonl"):
        with pytest.raises(UserError, match="expected some of code, conversations, jsonl:PATH"):
            parse_preference_sources(text)
    with pytest.raises(UserError, match=r"missing.jsonl does not exist"):
        ensure_preferences(PreferencesConfig(sources=f"jsonl:{tmp_path / 'missing.jsonl'}"), tmp_path, None)
    for options in ("@2", "!nofim", "?column=a"):
        with pytest.raises(UserError, match="takes split as its only option, and no weight or mark"):
            ensure_preferences(PreferencesConfig(sources=f"jsonl:{tmp_path / 'one.jsonl'}{options}"), tmp_path, None)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        ensure_preferences(PreferencesConfig(sources=f"jsonl:{tmp_path / 'pipe.jsonl'}"), tmp_path, None)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "p", "chosen": "c"}\n{"prompt": "p", "chosen": "c"}')
    with pytest.raises(
        UserError, match=r"2 of 2 rows .*columns found are prompt, chosen; expected chosen and rejected"
    ):
        ensure_preferences(PreferencesConfig(sources=f"jsonl:{one}"), tmp_path, None)
    one.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(UserError, match="has no pairs for"):
        ensure_preferences(PreferencesConfig(sources=f"jsonl:{one}"), tmp_path, None)
    assert not (tmp_path / "preferences").exists() or not any((tmp_path / "preferences").iterdir())


USER, REPLY, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So.\n"), ("assistant", "No."))
)
NAN = float("nan")
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = Conversation((Message("user", "Why?"),))
BRIEF = Conversation((Message("system", "Be brief."), *ASKED.messages))
HUMAN, GPT = {"from": "human", "value": "Why?"}, [{"from": "gpt", "value": text} for text in ("So.\n", "No.")]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
RESPONSE = {"role": "tool", "content": "2"}
TALK = Preference(ASKED, Reply("So.\n"), Reply("No."), "given")
WITH_SYSTEM = dataclasses.replace(TALK, prompt=BRIEF)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p\n", "chosen": " c\n", "rejected": ""}, Preference("p\n", " c\n", "", "given")),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "criteria": None, "score": 1},
            Preference("p", "c", "r", "given"),
        ),
        ({"chosen": "Q: why?\nA: so", "rejected": "Q: why?\nA: no"}, Preference("Q: why?\nA:", " so", " no", "given")),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}, TALK),
        ({"prompt": "Why?", "chosen": [REPLY], "rejected": [OTHER]}, TALK),
        ({"prompt": "Why?", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "messages": [USER, REPLY]}, TALK),
        ({"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, TALK),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, TALK),
        ({"chosen": [{**USER, "content": [{"type": "text", "text": "Why?"}]}, REPLY], "rejected": [USER, OTHER]}, TALK),
        ({"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER], "prompt": "Why?"}, WITH_SYSTEM),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER], "prompt": [SYSTEM, USER]}, WITH_SYSTEM),
        ({"system": "Be brief.", "question": "Why?", "chosen": "So.\n", "rejected": "No."}, WITH_SYSTEM),
        ({"instruction": "Why?", "input": "", "chosen": "So.\n", "rejected": "No."}, TALK),
        ({"conversations": [HUMAN], "chosen": GPT[0], "rejected": GPT[1]}, TALK),
        ({"conversations": [HUMAN], "system": "Be brief.", "chosen": GPT[0], "rejected": GPT[1]}, WITH_SYSTEM),
        ({"prompt": USER, "chosen": REPLY, "rejected": "No."}, TALK),
        ({"prompt": {"messages": [USER]}, "chosen": "So.\n", "rejected": {"content": "No.", "calls": []}}, TALK),
        (
            {"prompt": [USER], "chosen": [CALL, RESPONSE, REPLY], "rejected": [CALL, RESPONSE, OTHER]},
            dataclasses.replace(
                TALK,
                prompt=Conversation(
                    (*ASKED.messages, Message("assistant", "", (ToolCall("f", {"a": 1}),)), Message("tool", "2"))
                ),
            ),
        ),
        (
            {"prompt": [USER], "chosen": [CALL], "rejected": [OTHER], "tools": '[{"name": "f"}]'},
            Preference(
                Conversation(ASKED.messages, ({"type": "function", "function": {"name": "f"}},)),
                Reply("", ('{"name": "f", "arguments": {"a": 1}}',)),
                Reply("No."),
                "given",
            ),
        ),
    ],
)
def test_the_forms_of_data_sets(row: dict[str, Any], expected: Preference) -> None:
    assert preference_of(row, {}) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "no chosen and no rejected"),
        ({"prompt": "p", "chosen": "c"}, "no rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": []}, "no rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "have to differ"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, "have to differ"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"chosen": [REPLY], "rejected": [OTHER]}, "no prompt"),
        ({"prompt": [USER], "chosen": [USER, REPLY], "rejected": [OTHER]}, "chosen has the turns user, assistant"),
        (
            {"prompt": "Who?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            "another conversation than the prompt",
        ),
        ({"prompt": {"messages": 3}, "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, "the messages are 3"),
        ({"prompt": [USER, REPLY], "chosen": [OTHER], "rejected": [REPLY]}, "ends with a turn of the assistant"),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "r"}, "not valid Unicode"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "images": ["x"]}, "the column images cannot be used"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "criteria": 3}, "criteria is 3"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "reason": "\ud800"}, "the pair cannot be written as JSON"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "provenance": {"a": [NAN]}}, "cannot be written as JSON"),
    ],
)
def test_what_gives_no_preference_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises((UserError, ValueError), match=reason):
        preference_of(row, {})


def test_odd_rows_are_counted_and_named(tmp_path: Path) -> None:
    good = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(100)]
    bad = [{"prompt": "p", "chosen": "c", "rejected": "c"}, {"prompt": "p"}, good[3], "[" * 100_000]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + "\n".join(row if isinstance(row, str) else json.dumps(row) for row in [*good, *bad]))
    said = io.StringIO()
    settings = PreferencesConfig(sources=f"jsonl:{path}")
    found = ensure_preferences(settings, tmp_path, None, Progress(said))
    assert len(found.train) + len(found.validation) == 100
    assert found.train[0].provenance["row"].startswith("pairs.jsonl:")
    accounting = json.loads((found.folder / "accounting.json").read_text())
    assert accounting["left_out"] == 1
    unusable = accounting["unusable"][f"jsonl:{path}"]
    assert unusable["rows"] == 3
    assert [text.partition(" ")[0] for text in unusable["first"]] == [
        "pairs.jsonl:101",
        "pairs.jsonl:102",
        "pairs.jsonl:104",
    ]
    assert (
        said.getvalue() == f"preferences jsonl:{path}: 3 of 104 rows cannot be used: {'; '.join(unusable['first'])}\n"
    )
