"""The records of a run that somebody has changed: one message, before anything is written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.report.log_files import LogFiles
from smallcoder_jax.report.run_folder import RunFolder


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": Infinity}\n', "line 1: expected a JSON object of numbers with a 'step'"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1: expected a JSON object"),
        ("metrics.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("text_samples.json", '{"step": 1}', "is damaged; expected a list of text samples"),
        ("text_samples.json", '[{"step": NaN}]', "NaN is no JSON number"),
        ("text_samples.json", '[{"step": "1"}]', "is damaged; expected a list of text samples"),
        ("metrics_history.json", "[]", "holds a list, not a JSON object"),
        ("metrics_history.json", '{"references": [1]}', "is damaged: expected numbers by name in 'references'"),
        ("training_log.csv", "step,loss\n1,\x00\n", "expected a CSV file of numbers"),
        ("training_log.csv", "loss\n1\n", "expected a CSV file of numbers"),
        ("training_log.csv", "step,loss\n1,2,3\n", "expected a CSV file of numbers"),
        ("eval_log.csv", "step,loss\n1," + "9" * 200_000 + "\n", "expected a CSV file of numbers"),
        ("eval_log.csv", None, "it is a folder"),
        ("run.json", None, "it is a folder"),
        ("run.json", '{"starts": "abc"}', "'starts' is not the list"),
    ],
)
def test_a_record_of_another_form_is_one_message(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content) if content is not None else path.mkdir()
    with pytest.raises(UserError, match=said) as error:
        RunFolder(tmp_path).read_run_json() if name == "run.json" else LogFiles(RunFolder(tmp_path), 9, 9)
    assert name in str(error.value)
    assert [found.name for found in tmp_path.iterdir()] == [name]  # nothing was written
