"""The quick start waits for what checks the export, which is installed while it trains, and checks it once."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.configfile import load_config
from smallcoder_jax.evaluate.completions import Written
from smallcoder_jax.huggingface import write
from smallcoder_jax.loading import load
from smallcoder_jax.models import build
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import FLOAT32, tiny_model
from tests.tools.conftest import Recorded
from tools import quickstart
from tools.quickstart import is_checked, wait_for


def test_it_trains_the_model_that_the_documents_say() -> None:
    config = load_config(str(quickstart.CONFIG), [])
    assert config.name == "smallcoder-nano"
    assert (config.data.sources, config.compute.matmul) == ("stdlib", "auto")


def test_a_model_that_cannot_be_exported_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallcoder_jax.train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"cannot be exported to transformers: llama needs model\.mlp"):
        quickstart.main([f"--workdir={tmp_path}", "--config.model.mlp=gelu"])


def test_it_goes_on_when_the_checker_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = tmp_path / ".parity"
    timer = threading.Timer(0.3, stamp.touch)
    timer.start()
    wait_for(stamp)
    timer.join()
    assert "waiting for torch and transformers" in capsys.readouterr().out
    wait_for(stamp)
    assert not capsys.readouterr().out


def test_it_says_why_the_checker_could_not_be_installed(tmp_path: Path) -> None:
    (tmp_path / ".parity.failed").write_text("first\n" * 10 + "ERROR: No matching distribution found for torch\n")
    with pytest.raises(UserError, match="No matching distribution found for torch") as caught:
        wait_for(tmp_path / ".parity")
    assert "the same command continues from here" in str(caught.value)


def test_it_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "WAIT_SECONDS", 0)
    with pytest.raises(UserError, match="after 0 seconds torch and transformers are still not installed"):
        wait_for(tmp_path / ".parity")


def test_only_an_export_of_these_weights_that_was_checked_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=256)
    params = build.init_params(model, FLOAT32, jax.random.key(0))
    card = {
        "name": "x",
        "training": {},
        "evaluation": {},
        "data": {"dummy": False, "fingerprint": "", "sources": [], "licenses": {}},
    }

    def export(name: str, **checks: object) -> Path:
        folder = tmp_path / name
        write.write_export(
            folder, model=model, params=params, tokenizer=ByteTokenizer(), card=card,
            check=(lambda _: {"tolerance": 1e-4, "lengths": [1], "texts": 1, "greedy_tokens": 1}) if checks else None,
        )  # fmt: skip
        return folder

    checked = export("checked", parity=True)
    exported = load(checked)
    assert is_checked(checked, exported)
    assert not is_checked(export("unchecked"), exported)
    assert not is_checked(tmp_path / "none", exported)
    damaged = export("damaged", parity=True)
    (damaged / "config.json").write_text("{}")
    assert not is_checked(damaged, exported)
    other = dataclasses.replace(model, layers=1)
    smaller = build.init_params(other, FLOAT32, jax.random.key(0))
    assert not is_checked(checked, dataclasses.replace(exported, model=other, params=smaller))
    trained_on = jax.tree.map(lambda x: x + 1e-6, exported.params)
    assert not is_checked(checked, dataclasses.replace(exported, params=trained_on))


def test_its_figures_are_recorded_with_the_limit_of_its_exit_code(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"bits_per_byte": 2.3, "references": {"gzip -9": 2.285, "xz -9e": 2.208}}
    written = [Written("", "", parses=number < 2, repeats=False) for number in range(4)]
    monkeypatch.setattr("smallcoder_jax.train", lambda *_: SimpleNamespace(interrupted=False, tokens_seen=1))
    model = SimpleNamespace(generate=lambda *_, **__: [SimpleNamespace(text="x")])
    monkeypatch.setattr("smallcoder_jax.load", lambda _: model)
    monkeypatch.setattr("smallcoder_jax.run.evaluate_run", lambda *_: result)
    monkeypatch.setattr(quickstart, "complete_held_out", lambda *_: written)
    monkeypatch.setattr(quickstart, "is_checked", lambda *_: True)
    (tmp_path / "export").mkdir()
    with pytest.raises(CheckFailed, match=r"2\.300 bits per byte is not below"):
        quickstart.main([f"--workdir={tmp_path}", "--record"])
    figures = recorded("quickstart")
    assert 0 <= figures.pop("time of tools.quickstart, again")[0] < 60
    assert figures == {
        "bits per byte, file by file": (2.3, None, "below 2.208", False),
        "good greedy completions of 4": (50.0, "%", None, None),
        "bits per byte, gzip -9": (2.285, None, None, None),
        "bits per byte, xz -9e": (2.208, None, None, None),
    }
