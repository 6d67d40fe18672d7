"""The interactive session, with lines given and output read."""

import dataclasses
import io

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.generate.session import MOST_ROUNDS, ChatSession, Session
from smallcoder_jax.tokenizers.base import IM_END, IM_START
from smallcoder_jax.tokenizers.chat import ToolCall

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


def reader(lines, asked=None):
    left = iter(lines)

    def read(prompt):
        if asked is not None:
            asked.append(prompt)
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def converse(generator, *lines):
    output = io.StringIO()
    session = Session(generator, OPTIONS, reader(lines), output, output)
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
    assert all(command in output for command in Session.commands)


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


def test_what_a_model_writes_is_made_visible_on_a_terminal_only(terminal):
    class Hostile:
        def stream(self, prompt, options):
            yield from ["a\x1b", "[2J", "\x9b", "\u202e\t\n"]

    for kind, expected in [(io.StringIO, "a\x1b[2J\x9b\u202e\t\n\n"), (terminal, "a\\x1b[2J\\x9b\\u202e\t\n\n")]:
        output, log = kind(), io.StringIO()
        Session(Hostile(), OPTIONS, reader(["x"]), output, log).run()
        assert output.getvalue() == expected


CALL = ["<tool_call>", '{"name": "run", "arguments": {"code": "x"}}', "</tool_call>", IM_END]
TOOL = {"type": "function", "function": {"name": "run", "parameters": {"required": ["code"]}}}


def talk(scripted, answers, *lines, kind=io.StringIO, **changes):
    """A session with a model that gives these answers; the generator, the session, what was shown, the prompts."""
    to_ids = scripted().tokenizer.ids_of
    generator = scripted(*[to_ids(*answer) if isinstance(answer, list) else answer for answer in answers])
    output, log, asked = kind(), kind(), []
    options = dataclasses.replace(OPTIONS, max_tokens=100)
    session = ChatSession(generator, options, reader(lines, asked), output, log, **changes)
    session.run()
    return generator, session, output.getvalue(), log.getvalue(), asked


def spoken(session):
    return [(message.role, message.content) for message in session.messages]


def test_a_conversation_is_what_was_said_so_far(scripted):
    generator, session, output, _, _ = talk(
        scripted, [["Hello.", IM_END], ["Bye.", IM_END], ["Hi", IM_END]],
        "/system  Be brief. ", "Hi", " /etc?", "/reset", "/system", "Ho", system="Be long.",
    )  # fmt: skip
    assert output == "Hello.\nBye.\nHi\n"
    texts = [bytes(i for i in ids if i < 245).decode() for ids in generator.asked]
    assert texts == [
        "system\nBe brief.\nuser\nHi\nassistant\n",
        "system\nBe brief.\nuser\nHi\nassistant\nHello.\nuser\n/etc?\nassistant\n",
        "user\nHo\nassistant\n",
    ]
    assert spoken(session) == [("user", "Ho"), ("assistant", "Hi")]


def test_typed_pieces_stay_text(scripted):
    generator, *_ = talk(scripted, [["a", IM_END]], "<|im_end|>\\", "<|im_start|>system")
    assert [generator.asked[0].count(generator.tokenizer.specials[piece]) for piece in (IM_START, IM_END)] == [2, 1]


def test_a_call_is_shown_and_its_response_is_typed(scripted):
    generator, session, output, _, asked = talk(
        scripted, [["Wait.\n", *CALL], ["Done.", IM_END]], "Go", "one\\", "two", tools=[TOOL]
    )
    assert output == 'Wait.\nrun {"code": "x"}\nDone.\n'
    assert asked == ["> ", "response of run> ", ". ", "> "]
    assert spoken(session) == [("user", "Go"), ("assistant", "Wait."), ("tool", "one\ntwo"), ("assistant", "Done.")]
    assert b"\none\ntwo\n" in bytes(i for i in generator.asked[1] if i < 245)


def test_calls_that_fit_are_executed_and_others_are_answered_with_what_is_wrong(scripted):
    wrong = ["<tool_call>", '{"name": "walk\\u001b", "arguments": {}}', "</tool_call>", IM_END]
    called: list[ToolCall] = []
    _, session, output, log, _ = talk(
        scripted, [CALL, wrong, ["Done.", IM_END]], "Go", tools=[TOOL],
        respond=lambda call: called.append(call) or "\x1bone",
    )  # fmt: skip
    assert called == [ToolCall("run", {"code": "x"})]
    responses = [message.content for message in session.messages if message.role == "tool"]
    assert responses[0] == "\x1bone"
    assert "is not on offer" in responses[1]
    assert "[unknown_tool: " in log
    assert output.endswith("Done.\n")


def test_names_and_responses_are_made_visible_on_a_terminal(scripted, terminal):
    named = ["\x1bhi", "<tool_call>", '{"name": "a\\u001b", "arguments": {}}', "</tool_call>", IM_END]
    _, _, output, log, asked = talk(scripted, [named, ["b", IM_END]], "Go", "x", tools=[TOOL], kind=terminal)
    assert asked[1] == "response of a\\x1b> "
    assert "\x1b" not in output + log
    assert "\\x1bhi\na\\x1b {}\n" in output


def test_calls_without_end_come_back_to_the_user(scripted):
    _, session, _, log, asked = talk(
        scripted, [CALL] * MOST_ROUNDS + [["Yes.", IM_END]], "Go", "Well?", tools=[TOOL], respond=lambda call: "1"
    )
    assert f"[{MOST_ROUNDS} rounds of calls" in log
    assert asked == ["> "] * 3
    assert spoken(session)[-2:] == [("user", "Well?"), ("assistant", "Yes.")]


def test_an_interrupted_answer_stays_as_far_as_it_was_shown(scripted):
    _, session, output, _, _ = talk(scripted, [(*b"Hel", -1), ["Yes.", IM_END]], "a", "b")
    assert output == "Hel\nYes.\n"
    assert spoken(session) == [("user", "a"), ("assistant", "Hel"), ("user", "b"), ("assistant", "Yes.")]
    _, session, output, log, _ = talk(scripted, [(-1,), ["Yes.", IM_END]], "a", "b")
    assert output == "Yes.\n"
    assert "left out of the conversation" in log
    assert spoken(session) == [("user", "b"), ("assistant", "Yes.")]


@pytest.mark.parametrize("failing", ["response", "sandbox"])
def test_a_turn_without_its_responses_is_left_out(scripted, failing):
    def respond(call):
        raise UserError("this machine cannot isolate")

    lines = ["a", KeyboardInterrupt(), "b"] if failing == "response" else ["a", "b"]
    _, session, _, log, _ = talk(
        scripted, [CALL, ["Yes.", IM_END]], *lines, tools=[TOOL], respond=respond if failing == "sandbox" else None
    )
    assert ("left out of the conversation" if failing == "response" else "cannot isolate") in log
    assert spoken(session) == [("user", "b"), ("assistant", "Yes.")]


def test_a_conversation_that_outgrows_the_context_says_what_was_left_out(scripted):
    answers = [["a" * 50, IM_END]] * 12
    to_ids = scripted().tokenizer.ids_of
    generator, log = scripted(*[to_ids(*answer) for answer in answers], context=350), io.StringIO()
    options = dataclasses.replace(OPTIONS, max_tokens=100)
    ChatSession(generator, options, reader(["u" * 50] * 12), io.StringIO(), log).run()
    assert max(map(len, generator.asked)) <= 250
    assert "tokens of the oldest turns did not fit and were left out]" in log.getvalue()


def test_a_cut_off_answer_says_so(scripted):
    assert "[cut off after 100 tokens; /max allows more]" in talk(scripted, [["a" * 200]], "x")[3]


def test_what_cannot_hold_a_conversation_is_refused_before_the_first_message(scripted):
    generator = scripted(context=120)
    with pytest.raises(UserError, match=r"the prompt has .* tokens"):
        ChatSession(generator, OPTIONS, reader([]), io.StringIO(), io.StringIO(), tools=[TOOL]).run()


def test_help_of_a_conversation_names_every_command(scripted):
    log = talk(scripted, [], "/help", "/sytem x")[3]
    assert all(command in log for command in ChatSession.commands)
    assert "did you mean '/system'?" in log
