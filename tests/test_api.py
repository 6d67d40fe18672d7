"""The notebook interface, as the package's docstring shows it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

import smallcoder_jax as sc
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import default_config
from smallcoder_jax.tokenizers.chat import encode
from smallcoder_jax.tokenizers.chat_wire import from_wire

pytestmark = pytest.mark.usefixtures("standard_promotion")


def notebook_config(root: Path) -> Any:
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    config = default_config()
    config.name = "notebook"
    config.model.update(
        vocab_size=256, width=32, mlp_width=64, layers=1, heads=2, kv_heads=1, head_size=16, context=256
    )
    config.compute.dtype = "float32"
    config.tokenizer.kind = "bytes"
    config.data.update(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2)
    config.train.update(steps=2, batch_size=8, sequence_length=32, log_every=1)
    config.eval.update(every=0, batches=1, sample_tokens=4)
    config.log.update(tensorboard=False, charts_every=0)
    return config


def test_the_example_of_the_docstring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sc.__doc__ is not None
    lines = [line for line in sc.__doc__.splitlines() if line.startswith("    ")]
    example = textwrap.dedent("\n".join(lines))
    assert "sc.train(" in example
    assert "sc.load(" in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"config": notebook_config(tmp_path)}
    exec(compile(example, "docstring", "exec"), names)
    assert names["run"].step == 2
    assert not names["run"].interrupted
    assert names["run"].evaluation["loss"] > 0
    assert (tmp_path / names["run"].folder / "checkpoints" / "2" / "manifest.json").is_file()
    assert capsys.readouterr().out  # what the model wrote

    # The same call again continues: there is nothing left to do. A path of a config file does as well.
    values = names["config"].to_dict()
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    assert sc.train("config.py", "runs/mine").step == 2
    model = sc.load(tmp_path / "runs" / "mine", step=2)
    assert len(model.generate(["def a", "import "], max_tokens=3, temperature=0.0)) == 2

    # As a notebook shows it.
    size = "17,504 parameters, context 256, 256 tokenizer entries"
    assert repr(model) == f"<model of {tmp_path}/runs/mine, step 2: {size}>"
    assert len(repr(model.generate("def a", max_tokens=3))) < 300

    # A turn, whole and as it is written: what the model makes of the template's ids.
    messages = [{"role": "user", "content": "Hello."}]
    stream = model.chat_stream(messages, seed=5)
    pieces = list(stream)
    assert stream.reply() == model.chat(messages, seed=5)
    assert stream.reply().content == "".join(pieces)
    ids = encode(from_wire({"messages": messages}), model.tokenizer, reply=True).ids.tolist()
    (expected,) = model.generate([ids], seed=5)
    assert stream.reply().content == expected.text

    mistakes: list[tuple[Any, str]] = [
        (messages, r"model\.chat\(messages\)"),
        (messages[0], r"model\.chat\(messages\)"),
        ([messages], r"model\.chat\(messages\)"),
        (b"def a", "of type bytes"),
        ([b"def a"], "of type bytes"),
        (5, "of type int"),
        ([5], "of type int"),
        ([["a"]], "of type list"),
    ]
    for prompts, message in mistakes:
        with pytest.raises(UserError, match=message):
            model.generate(prompts)
    with pytest.raises(UserError, match="unknown option max_token=3; did you mean 'max_tokens'"):
        model.generate("def a", max_token=3)
    with pytest.raises(UserError, match=r"messages\[0\] has no role"):
        model.chat([{"content": "Hello."}])

    step = tmp_path / "runs" / "mine" / "checkpoints" / "2"
    for path, number in ((step, "2"), (step / "params", "2"), (step.parent, "STEP")):
        with pytest.raises(UserError, match=rf"--checkpoint {tmp_path}/runs/mine --step {number} "):
            sc.load(path)
    with pytest.raises(UserError, match=rf"does not exist, but .*--checkpoint {tmp_path}/runs/mine$"):
        sc.load(tmp_path / "runs" / "mine" / "export")


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        sc.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is neither a run"):
        sc.load(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read .*too long"):
        sc.load(tmp_path / ("x" * 10_000))
    config = default_config()
    config.data.sources = f"dir:{tmp_path / 'missing'}"
    config.data.dir = str(tmp_path / "data")
    with pytest.raises(UserError, match="missing does not exist"):
        sc.train(config, tmp_path / "run")
    with pytest.raises(AttributeError, match="public: load, train"):
        sc.__getattr__("evaluate")
