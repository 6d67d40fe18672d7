"""How a command ends."""

import subprocess
import sys

import pytest

from smallcoder_jax.base.errors import EXIT_NO_READER

PROGRAM = """
import sys
from smallcoder_jax.base.display import say
from smallcoder_jax.base.errors import run_cli

def main():
    for line in range(int(sys.argv[1])):
        say(f"line {line}") if sys.argv[2] == "say" else print(f"line {line}")

run_cli(main)
"""


@pytest.mark.parametrize(("lines", "how"), [("1000000", "say"), ("1000000", "print"), ("1", "print")])
def test_a_reader_that_ends_early_gets_no_traceback(lines: str, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, lines, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if lines != "1":
            assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == EXIT_NO_READER
