"""`python -m tools.generate`: flags to completions."""

import dataclasses
import io
import json
import os
import types

import pytest

import smallcoder_jax
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.toolbox.functions import TOOLS
from tools import generate as tool


def job_of(*flags):
    return tool.read_job(tool.build_parser().parse_args(["--checkpoint", "runs/any", *flags]))


def run(job, generator, lines=(), kind=io.StringIO):
    output, log, left = kind(), io.StringIO(), iter(lines)

    def read(_):
        for line in left:
            return line
        raise EOFError

    job.run(generator, read, output, log)
    return output.getvalue(), log.getvalue()


def test_every_sampling_flag_arrives():
    flags = "--max-tokens 5 --temperature 0.1 --top-k 6 --top-p 0.2 --repetition-penalty 1.3 --seed 8 --num-samples 2"
    job = job_of("--prompt", "a", *flags.split(), "--stop", "x", "--stop", "\n", "--truncate", "--batch-size", "3")
    assert job.options == SamplingOptions(
        max_tokens=5,
        temperature=0.1,
        top_k=6,
        top_p=0.2,
        repetition_penalty=1.3,
        seed=8,
        stop=("x", "\n"),
        num_samples=2,
        truncate_prompt=True,
    )
    assert job.batch_size == 3
    assert job_of("--prompt", "a").options == SamplingOptions()


def test_main_loads_the_checkpoint_and_prints_prompt_and_completion(tiny, monkeypatch, capsys):
    asked = []

    def load(path, step):
        asked.append((str(path), step))
        return types.SimpleNamespace(generator=tiny.generator())

    monkeypatch.setattr(smallcoder_jax, "load", load, raising=False)
    tool.main(
        ["--checkpoint", "runs/nano", "--step", "best", "--prompt", "x = ", "--max-tokens", "12", "--temperature", "0"]
    )
    (expected,) = tiny.generator().generate(["x = "], SamplingOptions(max_tokens=12, temperature=0.0))
    captured = capsys.readouterr()
    assert asked == [("runs/nano", "best")]
    assert captured.out == "x = " + expected.text + "\n" * (not expected.text.endswith("\n"))
    assert f"{len(expected.token_ids)} tokens in " in captured.err


def test_prompts_of_a_file_and_completions_into_one(tiny, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"a\\n"\n\n"import"\n', encoding="utf-8")
    flags = ["--prompt-file", str(prompts), "--output-file", str(out), "--num-samples", "2", "--max-tokens", "12"]
    printed, _ = run(job_of(*flags), tiny.generator())
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert printed == ""
    assert [(r["prompt"], r["sample"]) for r in records] == [("a\n", 0), ("a\n", 1), ("import", 0), ("import", 1)]
    expected = tiny.generator().generate(["a\n", "import"], SamplingOptions(max_tokens=12, num_samples=2))
    assert [(r["text"], r["tokens"], r["finish_reason"]) for r in records] == [
        (c.text, len(c.token_ids), c.finish_reason) for c in expected
    ]


@pytest.mark.parametrize("name", ["prompt.py", "prompt.md", "Dockerfile.dev"])
def test_a_file_of_code_is_one_prompt(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"a = 1\r\n\nb")
    assert job_of("--prompt-file", str(tmp_path / name)).prompts == ("a = 1\r\n\nb",)
    assert f"{name}: one prompt of 2 lines" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.txt", "prompts"])
def test_a_file_of_text_has_a_prompt_on_every_line(tmp_path, capsys, name):
    (tmp_path / name).write_bytes("\ufeffa = 1\r\n\n  b\u2028c \n \nd".encode())
    assert job_of("--prompt-file", str(tmp_path / name)).prompts == ("a = 1", "  b\u2028c ", "d")
    assert f"{name}: 3 prompts, one a line" in capsys.readouterr().err


def test_the_standard_input_is_one_prompt(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a\né".encode())))
    assert job_of("--prompt-file", "-").prompts == ("a\né",)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        job_of("--prompt-file", "-")
    monkeypatch.setattr(tool, "MAX_RECORD_BYTES", 3)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abcd")))
    with pytest.raises(UserError, match="more than 3 bytes"):
        job_of("--prompt-file", "-")


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "py"])
def test_what_is_no_file_of_prompts_is_refused_at_once(tmp_path, suffix):
    pipe, huge, device = [tmp_path / f"{kind}.{suffix}" for kind in ("pipe", "huge", "device")]
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    device.symlink_to("/dev/zero")
    for path, what in [(pipe, r"a pipe, not a file.*--prompt-file -"), (huge, "larger than"), (device, "a device")]:
        for flags in (["--prompt-file", str(path)], ["--file", str(path), "--line", "1"]):
            with pytest.raises(UserError, match=what if flags[0] == "--prompt-file" else what.split(".*")[0]):
                job_of(*flags)
        with pytest.raises(UserError, match=what.split(".*")[0]):
            job_of("--chat", "--tools", str(path))


def test_what_is_not_unicode_on_the_command_line_is_refused(scripted):
    broken = os.fsdecode(b"a\xff")
    for flags in (["--prompt", broken], ["--fim", "a", broken], ["--chat", "--prompt", broken]):
        with pytest.raises(UserError, match=r"not valid Unicode|surrogates"):
            run(job_of(*flags), scripted())
    for flags in (["--prompt", "a", "--stop", broken], ["--chat", "--system", broken], ["--chat", "--tools", broken]):
        with pytest.raises(UserError):
            job_of(*flags)


def test_a_terminal_is_shown_no_control_characters_and_a_pipe_the_exact_text(scripted, terminal):
    answers = [[*b"a\x1b[2J", 0xC2, 0x9B, 255]] * 2
    for kind, shown in [(terminal, "\\x07a\\x1b[2J\\x9b\n"), (io.StringIO, "\x07a\x1b[2J\x9b\n")]:
        for flags, start in ([("--prompt", "\x07"), shown], [("--chat", "--prompt", "x"), shown.split("7", 1)[-1]]):
            printed, _ = run(job_of(*flags), scripted(*answers), kind=kind)
            assert printed == start.removeprefix("\x07") if flags[0] == "--chat" else printed == start
    printed, _ = run(job_of("--prompt", "x", "--json"), scripted(*answers), kind=terminal)
    assert json.loads(printed)["text"] == "a\x1b[2J\x9b"


def test_the_standard_streams_are_utf_8_where_no_terminal_says_otherwise(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="latin-1"), io.TextIOWrapper(io.BytesIO(), "latin-1")]
    monkeypatch.setattr("sys.stdin", streams[0])
    monkeypatch.setattr("sys.stdout", streams[1])
    tool.set_encodings()
    assert tool.read_line("> ") == "\udcff"
    with pytest.raises(EOFError):
        tool.read_line("> ")
    print("日本\x1b", flush=True)
    assert streams[1].buffer.getvalue() == "日本\x1b\n".encode()


def test_a_line_without_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 10))
    monkeypatch.setattr(tool, "MAX_RECORD_BYTES", 5)
    with pytest.raises(UserError, match="5 characters or more"):
        tool.read_line("> ")


CALL = ["<tool_call>", '{"name": "execute_python", "arguments": {"code": "print(1)"}}', "</tool_call>", "<|im_end|>"]


def test_messages_are_answered_each_by_itself(scripted):
    ids = scripted().tokenizer.ids_of
    answers = [ids("Hi.", "<|im_end|>"), ids("So:\n", *CALL)]
    flags = ["--chat", "--system", "S", "--tools", "execute_python", "--prompt", "a", "--prompt", "b"]
    generator = scripted(*answers)
    printed, _ = run(job_of(*flags), generator)
    assert printed == (
        '=== prompt 1, sample 1 ===\nHi.\n=== prompt 2, sample 1 ===\nSo:\nexecute_python {"code": "print(1)"}\n'
    )
    texts = [bytes(i for i in asked if i < 245).decode() for asked in generator.asked]
    assert all(text.startswith("system\nS\n\nYou may call") for text in texts)
    assert [text.split("\nuser\n")[1] for text in texts] == ["a\nassistant\n", "b\nassistant\n"]
    printed, _ = run(job_of(*flags, "--json"), scripted(*answers))
    first, second = map(json.loads, printed.splitlines())
    assert (first["prompt"], first["text"], first["tool_calls"], first["errors"]) == ("a", "Hi.", [], [])
    assert (second["prompt"], second["text"]) == ("b", "So:")
    assert second["tool_calls"][0]["function"] == {"name": "execute_python", "arguments": '{"code": "print(1)"}'}


def test_wrong_calls_are_said(scripted):
    answer = scripted().tokenizer.ids_of("<tool_call>", "{", "</tool_call>", "<|im_end|>")
    printed, log = run(job_of("--chat", "--prompt", "a"), scripted(answer))
    assert printed == "\n"
    assert "prompt 1, sample 1: invalid_json: " in log


def test_built_in_functions_run_in_the_sandbox_and_those_of_a_file_do_not(scripted, tmp_path, monkeypatch):
    ids = scripted().tokenizer.ids_of
    answers = [ids(*CALL), ids("Done.", "<|im_end|>")]
    monkeypatch.setattr(tool, "respond", lambda call: f"ran {call.arguments['code']}")
    _, log = run(job_of("--chat", "--tools", "execute_python, run_tests"), scripted(*answers), ["go"])
    assert "ran print(1)" in log
    (tmp_path / "tools.json").write_text(json.dumps([TOOLS["execute_python"]]))
    job = job_of("--chat", "--tools", str(tmp_path / "tools.json"))
    printed, log = run(job, scripted(*answers), ["go", "typed"])
    assert printed == 'execute_python {"code": "print(1)"}\nDone.\n'
    assert "ran" not in log
    assert job.chat == tool.Chat("", (TOOLS["execute_python"],), executed=False)


def test_a_model_that_learned_no_turns_is_talked_with_after_a_word(scripted, monkeypatch, capsys):
    answer = scripted().tokenizer.ids_of("Hi.", "<|im_end|>")
    said = []
    # A run of language, one of conversations, an export.
    for info in ({"config": {"stage": {"name": "pretrain"}}}, {"config": {"stage": {"name": "sft"}}}, {}):
        model = types.SimpleNamespace(generator=scripted(answer), info=info)
        monkeypatch.setattr(smallcoder_jax, "load", lambda path, step, model=model: model, raising=False)
        tool.main(["--checkpoint", "runs/any", "--chat", "--prompt", "Hi"])
        said.append("did not train on conversations" in capsys.readouterr().err)
    assert said == [True, False, False]


def test_several_completions_are_headed(tiny):
    printed, _ = run(job_of("--prompt", "a", "--prompt", "b", "--max-tokens", "12"), tiny.generator())
    assert printed.startswith("=== prompt 1, sample 1 ===\na")
    assert "=== prompt 2, sample 1 ===\nb" in printed


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [(1, "", "a\r\n\x0cb\nc"), (2, "a\r\n", "\x0cb\nc"), (3, "a\r\n\x0cb\n", "c"), (4, "a\r\n\x0cb\nc", "")],
)
def test_a_file_is_split_at_the_start_of_a_line(tmp_path, line, before, after):
    path = tmp_path / "code.py"
    path.write_bytes(b"a\r\n\x0cb\nc")
    assert tool.split_file(path, line) == (before, after)


def test_a_line_of_a_long_file_is_filled_in_and_what_was_left_out_is_said(tiny, tmp_path):
    path = tmp_path / "code.py"
    path.write_text("x = 1\n" * 40, encoding="utf-8")
    job = job_of("--file", str(path), "--line", "21", "--max-tokens", "12")
    printed, log = run(job, tiny.generator())
    options = dataclasses.replace(job.options, truncate_prompt=True)
    (expected,) = tiny.generator().generate_fim("x = 1\n" * 20, "x = 1\n" * 20, options)
    assert printed.removesuffix("\n") == expected.text.removesuffix("\n")
    assert "prompt 1: 160 tokens did not fit" in log


def test_fim_prints_the_middle_only_and_refuses_what_does_not_fit(tiny):
    printed, _ = run(job_of("--fim", "ab", "cd", "--max-tokens", "12"), tiny.generator())
    (expected,) = tiny.generator().generate_fim("ab", "cd", SamplingOptions(max_tokens=12))
    assert printed.removesuffix("\n") == expected.text.removesuffix("\n")
    with pytest.raises(UserError, match="context is 96"):
        run(job_of("--fim", "x" * 200, "cd", "--max-tokens", "12"), tiny.generator())


def test_interactive_flags_reach_the_session(tiny):
    printed, log = run(job_of("--interactive", "--max-tokens", "12"), tiny.generator(), ["/max 3", "/quit"])
    assert printed == ""
    assert "max_tokens = 3" in log


def test_wrong_flags_and_files_are_explained(tmp_path):
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt": 1}\n', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('"a\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "code.py").write_text("a\n", encoding="utf-8")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "a", "parameters": {"type": 1}}}]')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "object.json").write_text("{}")
    cases = [
        (["--prompt-file", str(tmp_path / "none.txt")], "none.txt does not exist"),
        (["--prompt-file", str(tmp_path / "deep.jsonl")], "line 1: .*nested"),
        (["--prompt-file", str(tmp_path / ("x" * 10_000))], "too long"),
        (["--prompt-file", str(tmp_path)], "cannot be read"),
        (["--prompt-file", str(tmp_path / "bad.jsonl")], "line 2: expected a JSON string, got dict"),
        (["--prompt-file", str(tmp_path / "broken.jsonl")], "line 1"),
        (["--prompt-file", str(tmp_path / "empty.jsonl")], "no prompts"),
        (["--prompt-file", str(tmp_path / "binary")], "not UTF-8"),
        (["--file", str(tmp_path / "code.py")], "--line"),
        (["--prompt", "a", "--line", "1"], "--file"),
        (["--file", str(tmp_path / "code.py"), "--line", "3"], "give 1 to 2"),
        (["--prompt", "a", "--output-file", str(tmp_path / "no" / "out")], "no folder"),
        (["--prompt", "a", "--output-file", str(tmp_path)], "is a folder; name a file"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--prompt", "a", "--top-p", "3"], "top_p=3"),
        (["--prompt", "a", "--output-file", str(tmp_path / ("x" * 10_000))], "cannot be written"),
        (["--interactive", "--num-samples", "2"], "--interactive"),
        (["--chat", "--json"], "--json"),
        ([], "nothing to complete"),
        (["--prompt", "a", "--system", "b"], "add --chat"),
        (["--prompt", "a", "--tools", "run_tests"], "add --chat"),
        (["--chat", "--fim", "a", "b"], "--fim"),
        (["--chat", "--tools", "run_test"], "no function 'run_test' is built in; did you mean 'run_tests'"),
        (["--chat", "--tools", str(tmp_path / "tools.json")], r"tools.json: tools\[0\].function.parameters.type is 1"),
        (["--chat", "--tools", str(tmp_path / "deep.json")], "nested"),
        (["--chat", "--tools", str(tmp_path / "object.json")], "object.json"),
    ]
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            job_of(*flags)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_file_that_may_not_be_written_is_refused_beforehand(tmp_path, monkeypatch, there):
    path = tmp_path / "out.jsonl"
    if there:
        path.write_text("keep")
    # Permissions do not stop root, who may run this.
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != (path if there else tmp_path))
    with pytest.raises(UserError, match=r"out\.jsonl may not be written"):
        job_of("--prompt", "a", "--output-file", str(path))
