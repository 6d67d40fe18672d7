"""Calls that a model wrote are answered by the functions of conversations, inside of the sandbox."""

from __future__ import annotations

import os
from typing import Any

import pytest

from smallcoder_jax.tokenizers.chat import ToolCall
from smallcoder_jax.toolbox import functions
from smallcoder_jax.toolbox.execute import execute, respond
from smallcoder_jax.toolbox.functions import MAX_CHARACTERS, call_tool


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("execute_python", {"code": "print(1 + 1)"}),
        ("run_tests", {"code": "x = 1", "tests": "assert x == 2"}),
        ("search_docs", {"query": "join paths", "limit": 2}),
        ("analyze_code", {"code": "def f(x):\n    return g(x, 'é')\n", "aspect": "calls"}),
    ],
)
def test_the_response_is_that_of_training(name: str, arguments: dict[str, Any]) -> None:
    assert respond(ToolCall(name, arguments)) == call_tool(name, arguments, execute)


def test_code_is_read_in_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("read outside")

    monkeypatch.setattr(functions, "analyze", refuse)
    assert respond(ToolCall("analyze_code", {"code": "f()", "aspect": "calls"})) == '{"calls": ["f"]}'


@pytest.mark.parametrize("code", ["def", "(" * 50_000, "-" * 100_000 + "1", "x." * 20_000 + "y", "\0"])
def test_code_that_no_parser_takes_has_a_response(code: str) -> None:
    response = respond(ToolCall("analyze_code", {"code": code, "aspect": "functions"}))
    assert len(response) < MAX_CHARACTERS + 100


def test_a_command_sees_no_files_of_the_host() -> None:
    response = respond(ToolCall("execute_bash", {"command": f"ls {os.getcwd()}; echo done"}))
    assert response.startswith("done\n")
    assert "No such file" in response
