"""What a model writes, right and wrong, is read as a message and a list of what is wrong, in any portions."""

from __future__ import annotations

import random
import re
from typing import Any

import jsonschema
import pytest

from smallcoder_jax.tokenizers import chat_parser
from smallcoder_jax.tokenizers.chat import Message, ToolCall
from smallcoder_jax.tokenizers.chat_parser import MessageParser, check_call, parse, same_value
from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string"},
        "n": {"type": "integer"},
        "how": {"enum": ["fast", 1]},
        "many": {"type": "array", "items": {"type": ["number", "null"]}},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
    "required": ["code"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": PARAMETERS}}]
END, OPEN, CLOSE = "<|im_end|>", "<tool_call>", "</tool_call>"
GOOD = OPEN + '\n{"name": "run", "arguments": {"code": "x"}}\n' + CLOSE


def ids_of(text: str, tokenizer: SentencePieceTokenizer) -> list[int]:
    """Ids of a text in which pieces are written out."""
    parts = re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", text)
    return [
        i for n, part in enumerate(parts) for i in ([tokenizer.specials[part]] if n % 2 else tokenizer.encode(part))
    ]


def call(body: str) -> str:
    return f"{OPEN}\n{body}\n{CLOSE}{END}"


X = ToolCall("run", {"code": "x"})
CASES: dict[str, tuple[str, str, int, list[tuple[str, int | None]], bool]] = {
    # what was written; content, calls read, errors, ended
    "words": ("Hi.\n" + END, "Hi.\n", 0, [], True),
    "nothing": ("", "", 0, [], False),
    "cut off": ("Hi.\n\n", "Hi.\n\n", 0, [], False),
    "end of text": ("Hi.</s>never read", "Hi.", 0, [], False),
    "behind the end": (f"Hi.{END}{GOOD}", "Hi.", 0, [], True),
    "call": (GOOD + END, "", 1, [], True),
    "content and calls": (f"So:\n\n{GOOD}\n{GOOD}{END}", "So:\n", 2, [], True),
    "no newlines": (OPEN + '{"name":"run","arguments":{"code":"x"}}' + CLOSE + END, "", 1, [], True),
    "call without end": (GOOD, "", 1, [], False),
    "other order": (call('{"arguments": {"code": "x"}, "name": "run"}'), "", 1, [], True),
    "open call, end": (f"a\n{OPEN}\n" + '{"name": "run"' + END, "a", 0, [("unclosed_call", 0)], True),
    "open call, cut off": (f'{OPEN}\n{{"name"', "", 0, [("unclosed_call", 0)], False),
    "call in a call": (f"{OPEN}\n{GOOD}{END}", "", 1, [("unclosed_call", 0)], True),
    "closed only": (f"a{CLOSE}b{END}", "ab", 0, [("stray_piece", None)], True),
    "piece in content": (f"a<|fim_prefix|>b{END}", "ab", 0, [("stray_piece", None)], True),
    "piece in a call": (GOOD.replace("x", "x<pad>") + END, "", 1, [("stray_piece", 0)], True),
    "header again": (f"<|im_start|>{END}", "", 0, [("stray_piece", None)], True),
    "text between": (f"{GOOD}\nand\n{GOOD}{END}", "", 2, [("stray_text", None)], True),
    "text behind": (f"{GOOD}\nthere{END}", "", 1, [("stray_text", None)], True),
    "no JSON": (call("run(x)"), "", 0, [("invalid_json", 0)], True),
    "empty": (f"{OPEN}{CLOSE}{END}", "", 0, [("invalid_json", 0)], True),
    "second one bad": (f"{GOOD}\n" + call('{"name": "run"'), "", 1, [("invalid_json", 1)], True),
    "a list": (call('[{"name": "run", "arguments": {}}]'), "", 0, [("invalid_json", 0)], True),
    "two values": (call('{"name": "run", "arguments": {"code": "x"}} {}'), "", 0, [("invalid_json", 0)], True),
    "no arguments": (call('{"name": "run"}'), "", 1, [("loose_form", 0), ("missing_argument", 0)], True),
    "null arguments": (call('{"name": "run", "arguments": null}'), "", 1,
                       [("loose_form", 0), ("missing_argument", 0)], True),
    "parameters": (call('{"name": "run", "parameters": {"code": "x"}}'), "", 1, [("loose_form", 0)], True),
    "a string": (call('{"name": "run", "arguments": "{\\"code\\": \\"x\\"}"}'), "", 1, [("loose_form", 0)], True),
    "OpenAI's form": (call('{"id": "1", "type": "function", "function": {"name": "run", "arguments": {"code": "x"}}}'),
                      "", 1, [("loose_form", 0)], True),
    "both": (call('{"name": "run", "arguments": {"code": "x"}, "parameters": {}}'), "", 0, [("invalid_json", 0)], True),
    "a string that is no JSON": (call('{"name": "run", "arguments": "x"}'), "", 0, [("invalid_json", 0)], True),
    "a string with a list": (call('{"name": "run", "arguments": "[1]"}'), "", 0, [("invalid_json", 0)], True),
    "another key": (call('{"name": "run", "arguments": {"code": "x"}, "id": 1}'), "", 0, [("invalid_json", 0)], True),
    "name a number": (call('{"name": 1, "arguments": {}}'), "", 0, [("invalid_json", 0)], True),
    "NaN": (call('{"name": "run", "arguments": {"code": NaN}}'), "", 0, [("invalid_json", 0)], True),
    "infinity": (call('{"name": "run", "arguments": {"n": 1e999}}'), "", 0, [("invalid_json", 0)], True),
    "twice": (call('{"name": "run", "arguments": {"code": "x", "code": "y"}}'), "", 0, [("invalid_json", 0)], True),
    "half a pair": (call('{"name": "run", "arguments": {"code": "\\ud800"}}'), "", 0, [("invalid_json", 0)], True),
    "deep": (call('{"name": "run", "arguments": {"a":' + "[" * 120 + "]" * 120 + "}}"), "", 0,
             [("invalid_json", 0)], True),
    "too deep": (call('{"name": "run", "arguments": ' + "[" * 50_000), "", 0, [("invalid_json", 0)], True),
    "too long a number": (call('{"name": "run", "arguments": ' + "9" * 5000 + "}"), "", 0, [("invalid_json", 0)], True),
    "unknown tool": (call('{"name": "rm", "arguments": {"code": "x"}}'), "", 1, [("unknown_tool", 0)], True),
    "missing": (call('{"name": "run", "arguments": {}}'), "", 1, [("missing_argument", 0)], True),
    "wrong type": (call('{"name": "run", "arguments": {"code": 1}}'), "", 1, [("wrong_type", 0)], True),
    "unknown argument": (call('{"name": "run", "arguments": {"code": "x", "y": 1}}'), "", 1,
                         [("unknown_argument", 0)], True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("portions", ["whole", "single"])
def test_what_a_model_may_write(name: str, portions: str, trained: SentencePieceTokenizer) -> None:
    text, content, calls, errors, ended = CASES[name]
    ids = ids_of(text, trained)
    if portions == "whole":
        parsed = parse(ids, trained, TOOLS)
    else:
        parser = MessageParser(trained, TOOLS)
        streamed = "".join(parser.feed([i]) for i in ids)
        parsed = parser.finish()
        assert content.startswith(streamed)
        assert content[len(streamed) :] in ("", "\n")
    assert parsed.message.content == content
    assert len(parsed.message.tool_calls) == calls
    assert [(error.kind, error.call) for error in parsed.errors] == errors
    assert parsed.ended is ended
    if calls and {kind for kind, _ in errors} <= {"loose_form"}:
        assert set(map(repr, parsed.message.tool_calls)) == {repr(X)}


def test_a_character_in_several_ids_and_broken_bytes(trained: SentencePieceTokenizer) -> None:
    ids = trained.encode("\u4e2d")
    assert len(ids) == 3, "this test needs a character that is no entry"
    parser = MessageParser(trained, TOOLS)
    assert [parser.feed([i]) for i in ids] == ["", "", "\u4e2d"]
    assert parse(ids[:2], trained, TOOLS).message.content == "\ufffd"
    broken = [trained.specials[OPEN], *trained.encode('{"name": "'), *ids[:2], trained.specials[CLOSE]]
    assert [error.kind for error in parse(broken, trained, TOOLS).errors] == ["invalid_json"]


def test_random_ids_raise_nothing(trained: SentencePieceTokenizer) -> None:
    rng = random.Random(3)
    special = list(trained.specials.values())
    kinds = set()
    for _ in range(2000):
        ids = [rng.choice(special) if rng.random() < 0.3 else rng.randrange(trained.vocab_size) for _ in range(20)]
        parsed = parse(ids, trained, TOOLS)
        kinds |= {error.kind for error in parsed.errors}
        assert parsed.message.tool_calls == ()
    assert kinds == set(chat_parser.MALFORMED) - {"loose_form"}


def test_the_schema_check_agrees_with_jsonschema() -> None:
    rng = random.Random(5)
    values: list[Any] = ["x", "fast", 1, 1.0, 2.5, True, None, [], [1, None], ["a"], {}, {"on": True}, {"on": 1}, 2**70]
    keys = ["code", "n", "how", "many", "deep", "other"]
    tools = {"run": TOOLS[0]["function"]}
    seen = {True: 0, False: 0}
    for _ in range(3000):
        arguments = {key: rng.choice(values) for key in rng.sample(keys, rng.randrange(1, 3))}
        arguments |= {"code": "x"} if rng.random() < 0.7 else {}
        valid = jsonschema.Draft202012Validator(PARAMETERS).is_valid(arguments)
        assert (not check_call(ToolCall("run", arguments), tools)) == valid, arguments
        seen[valid] += 1
    assert min(seen.values()) > 50


def test_same_values() -> None:
    assert same_value({"a": [1, {"b": None}], "c": "x"}, {"c": "x", "a": [1.0, {"b": None}]})
    for a, b in [(1, True), (0, False), ("1", 1), ([1], [1, 1]), ({"a": 1}, {"b": 1}), ({}, []), (None, 0), ([], "")]:
        assert not same_value(a, b)
        assert not same_value([{"x": b}], [{"x": a}])


def test_the_message_of_an_error_says_what_was_expected(trained: SentencePieceTokenizer) -> None:
    def message(body: str) -> str:
        return parse(ids_of(call(body), trained), trained, TOOLS).errors[0].message

    assert message('{"name": "rm", "arguments": {}}') == "'rm' is not on offer; expected one of run"
    assert message('{"name": "run", "arguments": {"code": 1}}') == "arguments.code is 1; expected string"
    assert "line 3 column 1" in message('{"name":')
    assert parse([], trained, TOOLS).message == Message("assistant")
