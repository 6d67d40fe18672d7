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
from tools import generate as tool


def job_of(*flags):
    return tool.read_job(tool.build_parser().parse_args(["--checkpoint", "runs/any", *flags]))


def run(job, generator, lines=()):
    output, log, left = io.StringIO(), io.StringIO(), iter(lines)

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


def test_a_plain_file_is_one_prompt(tmp_path):
    (tmp_path / "prompt.py").write_bytes(b"a = 1\r\n\nb")
    assert job_of("--prompt-file", str(tmp_path / "prompt.py")).prompts == ("a = 1\r\n\nb",)


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
    printed, _ = run(job_of("--interactive", "--max-tokens", "12"), tiny.generator(), ["/max 3", "/quit"])
    assert "max_tokens = 3" in printed


def test_wrong_flags_and_files_are_explained(tmp_path):
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt": 1}\n', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('"a\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "code.py").write_text("a\n", encoding="utf-8")
    cases = [
        (["--prompt-file", str(tmp_path / "none.txt")], "none.txt cannot be read"),
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
        (["--interactive", "--num-samples", "2"], "--interactive"),
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
