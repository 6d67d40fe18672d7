"""What comes from elsewhere cannot move the cursor, run backwards or become markup."""

from smallcoder_jax.base import display

ESCAPE, BACKWARDS, HALF = "\x1b[2J", "\u202e", "\ud800"


def test_a_terminal_gets_no_control_characters_but_line_ends_and_tabs() -> None:
    assert display.printable(f"a\n\tb{ESCAPE}\r{BACKWARDS}{HALF}\x9b") == "a\n\tb\\x1b[2J\\r\\u202e\\ud800\\x9b"


def test_one_line_stays_one_line() -> None:
    assert display.one_line(f"a\nb\u2028\tc{BACKWARDS}") == "a\\nb\\u2028\\tc\\u202e"


def test_markdown_gets_no_markup() -> None:
    shown = display.markdown(f"# a\n| b | <img> [x](y) *z* `c` _d_ ~e~ &lt; {ESCAPE}")
    assert shown == r"\# a \| b \| \<img\> \[x\](y) \*z\* \`c\` \_d\_ \~e\~ \&lt; \\x1b\[2J"
