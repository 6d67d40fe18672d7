"""The main command: every kind of bad input is one message and exit code 2, and a bad file does not stop a run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from smallcoder_jax import loading
from smallcoder_jax.base.errors import EXIT_CHECK_FAILED, EXIT_USER_ERROR, UserError, run_cli
from smallcoder_jax.configfile import load_config
from smallcoder_jax.data.tokens.shards import Manifest, SourceEntry, Split
from smallcoder_jax.main import main
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.run import next_commands
from smallcoder_jax.stages.shared import documents

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from smallcoder_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "main"
    config.model.update(
        vocab_size=256, width=64, mlp_width=96, layers=1, heads=2, kv_heads=1, head_size=16, context=64
    )
    config.compute.dtype = "float32"
    config.tokenizer.kind = "bytes"
    config.data.update(validation_fraction=0.2)
    config.train.update(steps=2, batch_size=8, sequence_length=32, log_every=1)
    config.eval.update(every=0, batches=1, sample_tokens=0)
    config.log.update(tensorboard=False, charts_every=0)
    return config
"""

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Place:
    """A folder with a config file, source code, prepared data and runs."""

    def __init__(self, root: Path):
        self.root, self.code, self.data, self.run = root, root / "code", root / "data", root / "run"

    def make(self) -> Place:
        (self.root / "config.py").write_text(CONFIG)
        self.code.mkdir()
        for number in range(40):
            text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
            (self.code / f"f{number:02d}.py").write_text(text)
        return self

    def arguments(self, *more: str) -> list[str]:
        return [
            f"--config={self.root / 'config.py'}",
            f"--workdir={self.run}",
            f"--config.data.sources=dir:{self.code}",
            f"--config.data.dir={self.data}",
            *more,
        ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a run of two steps. One file in the middle cannot be read."""
    place = Place(tmp_path_factory.mktemp("trained")).make()
    (place.code / "f20.py").write_bytes(b"name = '\xff\xfe'\n" * 20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(place.arguments()) == 0
    return place


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command says when it ends with exit code 2: one message, after the progress of preparing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: main(arguments))
    assert ended.value.code == EXIT_USER_ERROR
    said = capsys.readouterr().err
    before, found, message = said.partition("error: ")
    assert found
    assert not before or before.endswith("\n")
    assert "error: " not in message
    assert "Traceback" not in said
    return message


def test_a_process_says_one_line_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "smallcoder_jax.main", "--config=configs/nanno.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr == "error: config file 'configs/nanno.py' does not exist; did you mean 'configs/nano.py'?\n"
    assert done.stdout == ""


def test_mistakes_in_the_arguments(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--config is missing": [],
        f"did you mean '{place.root / 'config.py'}'": [f"--config={place.root / 'confg.py'}"],
        "unknown config key 'train.step'; did you mean 'steps'?": place.arguments("--config.train.step=3"),
        "unknown config key 'trian.steps'; did you mean 'train'?": place.arguments("--config.trian.steps=3"),
        "--config.train.steps=many: expected int": place.arguments("--config.train.steps=many"),
        "expected one of 'adamw', 'muon'": place.arguments("--config.optimizer.name=sgd"),
        "train.batch_size=8 must be a multiple of train.microbatch_size=3": place.arguments(
            "--config.train.microbatch_size=3"
        ),
        "--step belongs to --mode=evaluate": place.arguments("--step=2"),
        "does not exist; train one": place.arguments("--mode=evaluate"),
        "is not a run, so it has no config of its own": ["--mode=evaluate", f"--workdir={place.run}"],
    }
    for expected, arguments in cases.items():
        assert expected in refusal(capsys, arguments), expected
    assert not place.run.exists()
    assert not place.data.exists()


def test_sources_without_anything_to_train_on(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "binary"):
        (place.root / name).mkdir()
    for number in range(3):
        (place.root / "binary" / f"{number}.py").write_bytes(bytes(range(256)) * 8)
    for name, expected in {"missing": "does not exist", "empty": "empty", "binary": "binary"}.items():
        said = refusal(capsys, place.arguments(f"--config.data.sources=dir:{place.root / name}"))
        assert expected in said.replace(str(place.root), ""), said
        assert f"dir:{place.root / name}" in said
    assert [path.name for path in place.run.iterdir()] == [".lock"]


def test_a_workdir_that_cannot_be_made_is_said_before_any_data_is_prepared(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, [*place.arguments(), f"--workdir={place.root / 'config.py' / 'run'}"])
    assert f"{place.root / 'config.py' / 'run'} cannot be written" in said
    assert "choose another --workdir" in said
    assert not place.data.exists()


def test_a_workdir_in_which_another_process_trains(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.run / "checkpoints" / "1").mkdir(parents=True)  # its save in flight
    with RunFolder(place.run).locked():
        said = refusal(capsys, place.arguments())
    assert f"another process trains in {place.run}" in said
    assert (place.run / "checkpoints" / "1").is_dir()


def test_another_vocabulary_than_the_tokenizer_has(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, trained.arguments("--config.model.vocab_size=512"))
    assert "256" in said
    assert "512" in said


def test_a_tokenizer_that_changed_since_the_data_was_prepared(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "aside" / "data")
    (recorded,) = data.glob("tokenizers/*/hash.json")
    recorded.write_text(json.dumps({"hash": "0" * 64}))
    said = refusal(capsys, trained.arguments(f"--config.data.dir={data}"))
    assert "the tokenizer changed since the data was prepared" in said
    (tokens,) = data.glob("tokens/*")
    assert f"delete {recorded.parent} and {tokens}; then" in said
    shutil.rmtree(recorded.parent)
    shutil.rmtree(tokens)
    capsys.readouterr()
    assert main([*trained.arguments(f"--config.data.dir={data}"), f"--workdir={tmp_path / 'a b'}"]) == 0
    said = capsys.readouterr().err
    assert "warning: the peak of the learning rate is never reached: optimizer.warmup_steps=500 is more than" in said
    assert f"--run '{tmp_path / 'a b'}'\n" in said


def test_a_batch_that_does_not_divide_over_the_mesh(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = f"--workdir={trained.root / 'uneven'}"
    said = refusal(capsys, [*trained.arguments("--config.train.batch_size=12"), workdir])
    assert "a batch of 12 rows" in said
    assert "use a multiple of 8" in said
    said = refusal(capsys, [*trained.arguments("--config.mesh.data=3"), workdir])
    assert "does not multiply to the 8 devices" in said


def test_a_workdir_of_another_run(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, trained.arguments("--config.train.seed=7", "--config.model.mlp_width=64"))
    assert f"{trained.run} holds another run" in said
    assert "train.seed: the run has 0, now 7" in said
    assert "model.mlp_width: the run has 96, now 64" in said
    assert "batch_size" not in said


def test_data_that_changed_is_another_run(trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = shutil.copytree(trained.code, tmp_path / "code")
    (code / "f41.py").write_text("def one_more(x):\n    # this file was not there when the run began\n    return x\n")
    said = refusal(
        capsys, trained.arguments(f"--config.data.sources=dir:{code}", f"--config.data.dir={tmp_path / 'data'}")
    )
    assert "data.fingerprint: the run has" in said


def test_a_damaged_checkpoint_is_not_continued(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run", symlinks=True)
    meta = run / "checkpoints" / "2" / "meta.json"
    meta.write_text(meta.read_text().replace('"tokens_seen"', '"tokens_Seen"'))
    said = refusal(capsys, [*trained.arguments(), f"--workdir={run}"])
    assert f"{meta}: content does not match its checksum" in said


def test_an_unreadable_file_is_skipped_and_counted(trained: Place) -> None:
    (manifest,) = trained.data.glob("tokens/*/manifest.json")
    (source,) = json.loads(manifest.read_text())["accounting"]["sources"]
    assert source["kept"] == 39
    assert source["unreadable"] == 1
    lines = (trained.run / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == [1, 2]
    assert json.loads((trained.run / "training_info.json").read_text())["parameters"] > 0


def test_a_finished_run_evaluates(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(trained.arguments("--mode=evaluate", "--step=2")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 0 < shown["bits_per_byte"] < 9
    assert any("xz" in name for name in shown["references"])
    assert shown["data"]["sources"] == f"dir:{trained.code}"
    assert shown["data"]["sequence_length"] == 32
    (line,) = [json.loads(line) for line in (trained.run / "evaluations.jsonl").read_text().splitlines()]
    assert {name: value for name, value in line.items() if name != "at"} == shown
    assert shown["step"] == 2
    # By the config that it was trained with.
    assert main(["--mode=evaluate", f"--workdir={trained.run}", "--step=2"]) == 0
    assert json.loads(capsys.readouterr().out) == shown
    assert "no checkpoint '7'" in refusal(capsys, trained.arguments("--mode=evaluate", "--step=7"))


def test_a_run_is_whole_and_evaluated_by_its_own_config(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied to a place where nothing else of it is: neither sources nor tokenizers, and then no data either."""
    monkeypatch.chdir(tmp_path)
    assert main(trained.arguments("--mode=evaluate")) == 0
    expected = capsys.readouterr().out
    run = shutil.copytree(trained.run, tmp_path / "copied", symlinks=True)
    data = shutil.copytree(trained.data, tmp_path / "aside" / "data")
    shutil.rmtree(data / "tokenizers")
    shutil.rmtree(data / "corpus")
    here, flags = [f"--workdir={run}", "--mode=evaluate"], [f"--config.data.dir={data}"]
    trained.root.rename(tmp_path / "gone")
    try:
        assert main([*here, *flags]) == 0
        assert capsys.readouterr().out == expected
        # The data are known by their fingerprint; a config that says otherwise is not what the run is evaluated by.
        assert main([f"--config={tmp_path / 'gone' / 'config.py'}", *here, *flags]) == 0
        told = capsys.readouterr()
        assert told.out == expected
        assert f"evaluated by the run's own config, {run / 'config.json'}" in told.err
        assert loading.load(run).generate("def ", max_tokens=4, temperature=0.0)[0].token_ids
        said = refusal(capsys, here)
        assert "name the folder of its prepared data with --config.data.dir" in said
        assert "unknown config key 'data.dirs'" in refusal(capsys, [*here, "--config.data.dirs=x"])
        shutil.rmtree(run / "tokenizer")
        assert f"put a copy of the run's tokenizer there as {run / 'tokenizer'}" in refusal(capsys, [*here, *flags])
    finally:
        shutil.rmtree(trained.root, ignore_errors=True)  # what preparing data there began with
        (tmp_path / "gone").rename(trained.root)
    assert "needs --workdir" in refusal(capsys, ["--mode=evaluate"])
    assert "is not a run, so it has no config of its own" in refusal(capsys, [f"--workdir={data}", "--mode=evaluate"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_not_evaluated(
    value: float, trained: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load

    def spoilt(*given: Any, **options: Any) -> loading.LoadedModel:
        loaded = load(*given, **options)
        params = jax.tree.map(np.array, loaded.params)
        params["final_norm"]["scale"][3] = value
        return dataclasses.replace(loaded, params=params)

    monkeypatch.setattr(loading, "load", spoilt)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: main(trained.arguments("--mode=evaluate", "--step=2")))
    assert ended.value.code == EXIT_CHECK_FAILED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is not finite: NaN or infinity in final_norm.scale" in shown.err


def test_a_run_is_not_evaluated_on_other_data_or_longer_rows(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = shutil.copytree(trained.code, tmp_path / "code")
    (code / "f41.py").write_text("def one_more(x):\n    # this file was not there when the run began\n    return x\n")
    other = [f"--config.data.sources=dir:{code}", f"--config.data.dir={tmp_path / 'data'}"]
    said = refusal(capsys, trained.arguments("--mode=evaluate", *other))
    fingerprints = [
        json.loads(manifest.read_text())["fingerprint"]
        for data in (trained.data, tmp_path / "data")
        for manifest in data.glob("tokens/*/manifest.json")
    ]
    assert len(fingerprints) == 2
    assert all(fingerprint in said for fingerprint in fingerprints)
    load = loading.load
    # An export does not say what it was trained on: then the output says what it was evaluated on.
    monkeypatch.setattr(loading, "load", lambda path, step: dataclasses.replace(load(path, step=step), info={}))
    assert main(trained.arguments("--mode=evaluate", *other)) == 0
    assert json.loads(capsys.readouterr().out)["data"]["fingerprint"] == fingerprints[1]
    monkeypatch.undo()
    # A model that was trained at 32 tokens and has a context of 64.
    said = refusal(
        capsys, trained.arguments("--mode=evaluate", "--config.train.sequence_length=128", "--config.model.context=128")
    )
    assert "train.sequence_length=128 is longer than the context" in said
    assert "64" in said


def test_stages_take_a_variant_behind_a_colon(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("configs/stages/code.py:nano", ["--config.stage.start=runs/language"])
    assert (config.name, config.model.width, config.stage.start) == ("smallcoder-nano-code", 192, "runs/language")
    assert load_config("configs/stages/tools.py", []).name == "smallcoder-small-tools"
    with pytest.raises(UserError, match=r"nana\.py' does not exist; did you mean '.*nano\.py'"):
        load_config("configs/stages/code.py:nana", [])
    with pytest.raises(UserError, match=r"takes no argument; leave .:nano. out"):
        load_config("configs/nano.py:nano", [])
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "configs/stages/grpo.py:VARIANT" in said
    assert "2,079,705,088" in said


def test_a_checkpoint_is_named_by_its_run_and_step(trained: Place) -> None:
    for path, step in ((trained.run / "checkpoints" / "2", "2"), (trained.run / "checkpoints", "STEP")):
        with pytest.raises(UserError, match=rf"belongs to the run {trained.run}; .*--step {step} "):
            loading.load(path)


def test_the_end_advises_nothing_that_would_be_refused() -> None:
    nano = load_config("configs/nano.py", [])
    reward = dataclasses.replace(nano, stage=dataclasses.replace(nano.stage, name="reward"))
    windowed = dataclasses.replace(nano, model=dataclasses.replace(nano.model, window=8))
    commands = [next_commands(config, Path("runs/a b;c")) for config in (nano, reward, windowed)]
    assert [sum("tools.export" in command for command in each) for each in commands] == [1, 0, 0]
    assert all(shlex.split(command)[4] == "runs/a b;c" for each in commands for command in each)


def entry(spec: str, weight: float, documents: int, tokens: int) -> SourceEntry:
    split = Split(**{field.name: 0 for field in dataclasses.fields(Split)})
    return SourceEntry(spec, weight, True, dataclasses.replace(split, documents=documents, tokens=tokens), split)


def test_epochs_are_counted_for_each_source() -> None:
    nano = load_config("configs/nano.py", ["--config.train.steps=100", "--config.train.batch_size=10"])
    small, large = entry("jsonl:rows", 3.0, 10, 1000), entry("stdlib", 1.0, 1000, 480_000)
    manifest = Manifest("", "", "uint16", 256, "", False, (small, large), {})
    planned = documents.epochs(
        nano, manifest
    )  # 100 x 10 x 384 = 384,000 tokens, three quarters of them of the small one
    assert planned == {"jsonl:rows": pytest.approx(288.0), "stdlib": pytest.approx(0.2)}
    assert documents._epochs_in_words(planned) == "288 of jsonl:rows, 0.20 of stdlib"
    (warning,) = documents._repetition(planned)
    assert "epochs planned: 288 of jsonl:rows; " in warning
    assert documents._repetition({"stdlib": 4.0}) == ()
    # A document a row: 1000 rows, of which a document of the small source, a fifth as long, takes 3 x 4.8 shares.
    rows = dataclasses.replace(nano, data=dataclasses.replace(nano.data, packing="document"))
    planned = documents.epochs(rows, manifest)
    assert planned["jsonl:rows"] * 10 + planned["stdlib"] * 1000 == pytest.approx(1000)
    assert planned["jsonl:rows"] * 10 == pytest.approx(1000 * 3 * 4.8 / (3 * 4.8 + 1))
