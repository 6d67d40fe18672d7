"""What the executable functions of conversations answer: the program run in the sandbox, and what it wrote."""

from __future__ import annotations

from typing import Any

from smallcoder_jax.evaluate import sandbox


def execute(name: str, arguments: dict[str, Any]) -> str:
    """The output, errors behind it, of `execute_python` or `execute_bash`; ends with why a run was stopped, if it was.

    UserError: this machine cannot isolate.
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
