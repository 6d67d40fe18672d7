"""The interactive session, with lines given and output read."""

import dataclasses
import io

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.session import COMMANDS, Session

OPTIONS = SamplingOptions(max_tokens=12, seed=3)


class Recorder:
    """Stands in for a generator: says what it was asked, and writes two pieces."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def stream(self, prompt, options):
        self.asked.append((prompt, options))
        yield "one "
        if self.error:
            raise self.error
        yield "two"


def converse(generator, *lines):
    output, left = io.StringIO(), iter(lines)

    def read(_):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    session = Session(generator, OPTIONS, read, output)
    session.run()
    return session, output.getvalue()


def test_a_prompt_is_completed_as_the_model_does(tiny):
    _, output = converse(tiny.generator(), "x = 1")
    (expected,) = tiny.generator().generate(["x = 1"], OPTIONS)
    assert expected.text in output


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("/temp 0.25", "temperature", 0.25),
        ("/topk 7", "top_k", 7),
        ("/topp 0.5", "top_p", 0.5),
        ("/max 9", "max_tokens", 9),
    ],
)
def test_commands_change_what_is_asked_for(command, option, value):
    recorder = Recorder()
    _, output = converse(recorder, command, "go")
    assert getattr(recorder.asked[0][1], option) == value
    assert f"{option} = {value}" in output


def test_greedy_and_back_to_the_last_temperature():
    recorder = Recorder()
    converse(recorder, "/temp 1.5", "/greedy", "a", "/sample", "b")
    assert [options.temperature for _, options in recorder.asked] == [0.0, 1.5]


@pytest.mark.parametrize("wrong", ["/temp", "/temp hot", "/topk 1 2", "/topp 2", "/max 0"])
def test_a_wrong_value_is_explained_and_changes_nothing(wrong):
    session, output = converse(Recorder(), wrong)
    assert "error: " in output
    assert session.options == OPTIONS


def test_an_unknown_command_names_the_nearest():
    assert "unknown command /tmep; did you mean '/temp'?" in converse(Recorder(), "/tmep 1")[1]


def test_help_names_every_command():
    _, output = converse(Recorder(), "/help")
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("end", ["/quit", EOFError(), KeyboardInterrupt()])
def test_every_way_out_is_clean(end):
    recorder = Recorder()
    converse(recorder, "a", end, "b")
    assert [prompt for prompt, _ in recorder.asked] == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("too long")])
def test_what_ends_a_completion_does_not_end_the_session(error):
    recorder = Recorder(error)
    _, output = converse(recorder, "a", "b")
    assert len(recorder.asked) == 2
    assert output.count("one ") == 2
    assert ("error: too long" in output) == isinstance(error, UserError)


def test_a_backslash_continues_a_prompt_and_empty_lines_ask_nothing():
    recorder = Recorder()
    converse(recorder, "def f():\\", "    return\\", "", "   ", "")
    assert [prompt for prompt, _ in recorder.asked] == ["def f():\n    return\n"]


def test_every_completion_has_its_own_seed():
    recorder = Recorder()
    converse(recorder, "a", "a")
    assert [options for _, options in recorder.asked] == [OPTIONS, dataclasses.replace(OPTIONS, seed=4)]
