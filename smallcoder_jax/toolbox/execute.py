"""Executes the function calls of conversations. Everything that a model wrote is run in the sandbox, and only there."""

from __future__ import annotations

import inspect
from typing import Any

from smallcoder_jax.sandbox import run as sandbox
from smallcoder_jax.tokenizers.chat import ToolCall
from smallcoder_jax.toolbox import functions


def execute(name: str, arguments: dict[str, Any]) -> str:
    """The standard output followed by the standard error of `execute_python` or `execute_bash`. Where the program was
    stopped, the text ends with the reason.

    Raises UserError where this machine cannot isolate programs.
    """
    if name == "execute_python":
        outcome = sandbox.run_python(arguments["code"])
    elif name == "execute_bash":
        outcome = sandbox.run_command(arguments["command"])
    else:
        raise ValueError(f"{name} is not run as a program")
    text = outcome.stdout + outcome.stderr
    if outcome.ended != "finished":
        text += f"[stopped: {outcome.ended}]\n"
    elif not outcome.stderr and outcome.error:
        text += f"{outcome.error}\n"
    return text


def respond(call: ToolCall) -> str:
    """The response of one of `functions.TOOLS` to a call that matches its schema, whoever wrote the call.

    Functions that only read code run in the sandbox, too: code on which a parser fails gives a traceback in the
    response. Raises UserError where this machine cannot isolate programs.
    """
    if call.name in ("search_docs", "analyze_code"):
        source = inspect.getsource(functions)
        program = f"{source}\nprint(call_tool({call.name!r}, {call.arguments!r}, lambda *_: ''))"
        call = ToolCall("execute_python", {"code": program})
    return functions.call_tool(call.name, call.arguments, execute)
