"""What comes from elsewhere cannot move the cursor, run backwards or become markup."""

import os
import subprocess
import sys

import pytest

from smallcoder_jax.base import display
from smallcoder_jax.base.arguments import ArgumentParser

ESCAPE, BACKWARDS, HALF = "\x1b[2J", "\u202e", "\ud800"


def test_a_terminal_gets_no_control_characters_but_line_ends_and_tabs() -> None:
    assert display.printable(f"a\n\tb{ESCAPE}\r{BACKWARDS}{HALF}\x9b") == "a\n\tb\\x1b[2J\\r\\u202e\\ud800\\x9b"


def test_one_line_stays_one_line() -> None:
    assert display.one_line(f"a\nb\u2028\tc{BACKWARDS}") == "a\\nb\\u2028\\tc\\u202e"


def test_markdown_gets_no_markup() -> None:
    shown = display.markdown(f"# a\n| b | <img> [x](y) *z* `c` _d_ ~e~ &lt; {ESCAPE}")
    assert shown == r"\# a \| b \| \<img\> \[x\](y) \*z\* \`c\` \_d\_ \~e\~ \&lt; \\x1b\[2J"


def test_a_code_span_ends_where_it_should() -> None:
    assert display.code(f"a`b{ESCAPE}\n") == r"a'b\x1b[2J\n"


def test_a_terminal_of_any_encoding_is_no_traceback() -> None:
    code = (
        "import sys\nfrom smallcoder_jax.base import display, errors\n"
        "def main():\n    display.say('é\\udcff\\x1b')\n    raise errors.UserError('é\\udcff\\x1b')\n"
        "errors.run_cli(main)"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        rb"\xe9\udcff\x1b" + b"\n",
        rb"error: \xe9\udcff\x1b" + b"\n",
    )


def test_a_flag_that_is_not_known_is_repeated_so_that_it_can_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ArgumentParser(prog="x").parse_args([f"--{ESCAPE}{BACKWARDS}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("x: error: unrecognized arguments: --\\x1b[2J\\u202e\n")
