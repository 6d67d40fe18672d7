"""Both sides generate as many tokens as asked for, and limits are held against their rates."""

from __future__ import annotations

import types
from typing import Any

import pytest

from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.config import Config, default_config, from_config_dict
from tests.helpers import tiny_config, tiny_model
from tests.tools.conftest import Recorded
from tools.bench import benchmarks, generation

BYTES = str(benchmarks.ROOT / "configs" / "byte_nano.py")


def bytes_config() -> Config:
    config = default_config("hnet")
    config.model.update(width=32, inner_widths=(48,), encoder_blocks=(1,), decoder_blocks=(1,), blocks=1, context=64)
    config.compute.dtype, config.tokenizer.kind = "float32", "bytes"
    config.train.sequence_length, config.eval.sample_tokens = 32, 0
    return from_config_dict(config)


@pytest.mark.parametrize("family", ["hnet", "decoder"])
def test_both_generate(family: str) -> None:
    config = bytes_config() if family == "hnet" else tiny_config(model=tiny_model(vocab_size=256))
    prompts = [[97, 98, 99, 100], [104, 105, 106, 107]]
    job = {"tokens": 6, "compile": False}
    for measure in (generation.measure_ours, generation.measure_torch):
        found = measure(config, prompts, job)
        assert found["tokens_per_second"] > 0
        assert found["memory"] > 2**20
        assert "jax" in found["software"] or "torch" in found["software"]


def test_a_text_that_the_random_model_ends_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Generator:
        def __init__(self, *_: Any): ...

        def generate(self, prompts: Any, options: Any, batch_size: int) -> list[Any]:
            given.append(prompts)
            length = 6 if len(given) > limit else 2
            return [types.SimpleNamespace(token_ids=(1,) * length, tokens_per_second=7.0) for _ in prompts]

    monkeypatch.setattr("smallcoder_jax.generate.engine.Generator", Generator)
    limit = 3
    found = generation.measure_ours(bytes_config(), [[97] * 4] * 2, {"tokens": 6, "compile": False})
    assert found["tokens_per_second"] == 14.0
    assert len({str(prompts) for prompts in given}) == 3  # of four calls, the first only compiles
    limit = 1000
    with pytest.raises(UserError, match="ends every text"):
        generation.measure_ours(bytes_config(), [[97] * 4] * 2, {"tokens": 6, "compile": False})


def result(name: str, rate: float, memory: int) -> dict[str, Any]:
    return {"software": name, "accelerator": False, "tokens_per_second": rate, "memory": memory}


def run(monkeypatch: pytest.MonkeyPatch, rate: float, memory: int, *flags: str) -> list[dict[str, Any]]:
    """The jobs of a run whose contender reaches 100 tokens/s in 100 MiB."""
    jobs = []

    def contend(job: dict[str, Any], python: str, *, module: str) -> dict[str, Any]:
        assert module == "tools.bench.generation"
        jobs.append(job)
        return result("ours", rate, memory << 20) if job["name"] == "ours" else result("torch", 100.0, 100 << 20)

    monkeypatch.setattr(generation, "run_contender", contend)
    generation.main([f"--config={BYTES}", "--against=torch", *flags])
    return jobs


def test_contenders_take_turns_and_the_ratios_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    jobs = run(monkeypatch, 500.0, 90, "--check", "--rows=2")
    assert [job["name"] for job in jobs] == ["ours", "torch", "torch", "ours"]
    assert {(job["rows"], job["prompt"], job["tokens"]) for job in jobs} == {(2, 256, 256)}
    assert capsys.readouterr().out.splitlines()[-1].split() == ["ours", "/", "torch", "5.00", "0.90"]


@pytest.mark.parametrize(
    ("rate", "memory", "said"),
    [(499.0, 90, "4.99 times the tokens per second of torch; expected 5"), (900.0, 101, "1.01 times the memory")],
)
def test_what_is_too_slow_or_too_large_fails_and_is_recorded(
    rate: float, memory: int, said: str, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckFailed, match=said):
        run(monkeypatch, rate, memory, "--check", "--record")
    assert recorded("generation") == {
        "byte-nano 1x256+256: tokens/s": (rate, None, None, None),
        "byte-nano 1x256+256: memory": (memory, "MiB", None, None),
        "byte-nano 1x256+256: torch tokens/s": (100, None, None, None),
        "byte-nano 1x256+256: torch memory": (100, "MiB", None, None),
        "byte-nano 1x256+256: times torch": (rate / 100, None, "≥ 5", rate >= 500),
        "byte-nano 1x256+256: memory / torch": (memory / 100, None, "≤ 1", memory <= 100),
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--check"], "add --against=torch"),
        (["--tokens=1"], "expected at least 2"),
        (["--prompt=2000", "--tokens=49"], "at most model.context=2048"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generation.main([f"--config={BYTES}", *flags])
