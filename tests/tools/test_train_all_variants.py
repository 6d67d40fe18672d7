"""All variants by one command: a failure is recorded and the others go on, a killed start is continued."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.presets import PRESETS, find_preset, preset_overrides
from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.configfile import load_config
from tools import train_all_variants

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0

CONFIG = """
from smallcoder_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "{name}"
    config.model.update(
        vocab_size=256, width=32, mlp_width=32, layers=1, heads=1, kv_heads=1, head_size=32, context={context}
    )
    config.tokenizer.kind = "bytes"
    config.train.update(steps=2, batch_size=8, sequence_length=32)
    config.eval.sample_tokens = 0
    return config
"""

# Stands in for smallcoder_jax.main: takes its arguments down and does what `orders` says of its variant.
TRAINER = """
import json, os, pathlib, signal, sys, time
from smallcoder_jax.config import to_dict
from smallcoder_jax.configfile import load_config, split_overrides
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
given, overrides = split_overrides(sys.argv[1:])
values = dict(word.lstrip("-").split("=", 1) for word in given)
run = pathlib.Path(values["workdir"])
with (run.parent / "calls").open("a") as calls:
    calls.write(run.name + "\\n")
print("training", run.name, file=sys.stderr, flush=True)
order = json.loads((run.parent / "orders").read_text()).get(run.name, "train")
if order == "refuse":
    print("error: what was given\\n  and what to do", file=sys.stderr)
    sys.exit(2)
if order == "crash":
    raise ValueError("out of luck")
if order == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if order == "wait":
    time.sleep(60)
if order == "be slow":
    time.sleep(1)
run.mkdir(exist_ok=True)
(run / "config.json").write_text(json.dumps(to_dict(load_config(values["config"], overrides))))
(run / "run.json").write_text("{}")
names = ("steps", "tokens_seen", "final_train_loss", "best_val_loss", "train_seconds", "dummy_data", "trained_at")
(run / "training_info.json").write_text(json.dumps(dict.fromkeys(names, 1)))
"""
# Stands in for tools.verify_models.
VERIFIER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[2].partition("=")[2])
wrong = json.loads((folder / "orders").read_text()).get("verifier", [])
runs = sorted(path.parent for path in folder.rglob("run.json"))
verdicts = [
    {"run": str(run), "status": "wrong_data" if run.name in wrong else "verified", "reason": "looked", "step": 2,
     "bits_per_byte": 1.5}
    for run in runs
]
print(json.dumps(verdicts))
sys.exit(3 if wrong else 0)
"""


class Place:
    """A workdir with three variants of a trainer that does as it is told."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]):
        self.root, self.workdir, self.capsys = root, root / "all", capsys
        self.workdir.mkdir()
        for name in ("one", "two", "three"):
            (root / f"{name}.py").write_text(CONFIG.format(name=name, context=16 if name == "two" else 64))
        for name, text in (("trainer.py", TRAINER), ("verifier.py", VERIFIER)):
            (root / name).write_text(text)

    def order(self, **orders: Any) -> None:
        (self.workdir / "orders").write_text(json.dumps(orders))

    def arguments(self, *more: str) -> list[str]:
        variants = ",".join(str(self.root / f"{name}.py") for name in ("one", "two", "three"))
        return [f"--variants={variants}", f"--workdir={self.workdir}", "--config.train.sequence_length=16", *more]

    def start(self, *more: str) -> tuple[int, str]:
        self.capsys.readouterr()
        code = train_all_variants.main(self.arguments(*more))
        shown = self.capsys.readouterr()
        return code, shown.err + shown.out

    def calls(self) -> list[str]:
        path = self.workdir / "calls"
        called = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return called

    def summary(self) -> dict[str, Any]:
        return json.loads((self.workdir / "training_summary.json").read_text())

    def statuses(self) -> dict[str, str]:
        return {variant: result["status"] for variant, result in self.summary()["results"].items()}


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path, capsys)
    monkeypatch.setattr(train_all_variants, "TRAINER", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.setattr(train_all_variants, "VERIFIER", (sys.executable, str(tmp_path / "verifier.py")))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place.order()
    return place


def test_all_are_trained_and_verified_and_not_trained_anew(place: Place) -> None:
    code, said = place.start("--steps=3", "--num-samples=7")
    assert (code, place.calls()) == (0, ["one", "two", "three"])
    summary = place.summary()
    assert set(summary) == {"results", "dataset", "num_samples", "timestamp", "args"}
    assert (summary["dataset"], summary["num_samples"]) == ("hf:bigcode/the-stack-smol", 7)
    assert summary["args"]["steps"] == 3
    assert summary["args"]["overrides"] == ["--config.train.sequence_length=16"]
    for variant, result in summary["results"].items():
        assert (result["status"], result["verification"]["status"]) == ("trained", "verified")
        assert result["parameters"] > 0
        assert f"training {variant}" in said
        assert (place.workdir / f"{variant}.log").read_text() == f"training {variant}\n"
    assert json.loads((place.workdir / "one" / "config.json").read_text())["train"]["steps"] == 3
    assert [line.split()[:3] for line in said.splitlines()[-3:]] == [
        [variant, "trained", "verified"] for variant in ("one", "two", "three")
    ]
    assert place.start("--steps=3", "--num-samples=7")[0] == 0
    assert place.calls() == []
    # Another config is another matter, about which the trainer decides; so is a folder that is gone.
    shutil.rmtree(place.workdir / "two")
    assert place.start("--steps=3", "--num-samples=7")[0] == 0
    assert place.calls() == ["two"]
    assert place.start("--steps=4", "--num-samples=7")[0] == 0
    assert place.calls() == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("refuse", "what was given\n  and what to do"),
        ("crash", "exit code 1: ValueError: out of luck"),
        ("die", "killed by SIGKILL: training two"),
    ],
)
def test_a_variant_that_fails_is_recorded_and_the_others_go_on(place: Place, order: str, reason: str) -> None:
    place.order(two=order)
    with pytest.raises(CheckFailed) as failed:
        place.start()
    assert f"two failed: {reason}" in str(failed.value)
    assert place.calls() == ["one", "two", "three"]
    assert place.statuses() == {"one": "trained", "two": "failed", "three": "trained"}
    assert place.summary()["results"]["two"]["reason"] == reason
    place.order()
    assert place.start()[0] == 0
    assert place.calls() == ["two"]


def test_a_variant_that_the_flags_do_not_fit_fails_and_the_others_go_on(place: Place) -> None:
    with pytest.raises(CheckFailed, match=r"(?s)two failed: .*train.sequence_length=32.*model.context=16"):
        place.start("--config.train.sequence_length=32")
    assert place.calls() == ["one", "three"]
    assert place.statuses() == {"one": "trained", "two": "failed", "three": "trained"}


def test_a_run_that_is_not_verified_is_said(place: Place) -> None:
    place.order(verifier=["three"])
    with pytest.raises(CheckFailed, match=r"all/three wrong_data: looked"):
        place.start()
    assert place.summary()["results"]["three"]["verification"]["status"] == "wrong_data"
    place.calls()
    place.order()
    assert place.start()[0] == 0  # looked at again, though nothing is trained
    assert place.calls() == []
    assert place.summary()["results"]["three"]["verification"]["status"] == "verified"


def test_results_of_earlier_starts_are_kept(place: Place) -> None:
    assert place.start(f"--variants={place.root / 'one.py'}")[0] == 0
    assert place.start(f"--variants={place.root / 'three.py'}")[0] == 0
    assert place.statuses() == {"one": "trained", "three": "trained"}
    (place.workdir / "training_summary.json").write_text('{"results": []}')
    with pytest.raises(UserError, match="delete it"):
        place.start()


def starting(place: Place) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    program = (
        "import sys; from tools import train_all_variants as all_variants\n"
        "from smallcoder_jax.base.errors import run_cli\n"
        f"all_variants.TRAINER = (sys.executable, {str(place.root / 'trainer.py')!r})\n"
        f"all_variants.VERIFIER = (sys.executable, {str(place.root / 'verifier.py')!r})\n"
        "run_cli(lambda: all_variants.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *place.arguments()]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_call(place: Place, variant: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (place.workdir / "calls").exists() or variant not in (place.workdir / "calls").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_is_passed_on_and_the_same_command_continues(place: Place) -> None:
    place.order(two="wait")
    process = starting(place)
    wait_for_call(place, "two")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert place.calls() == ["one", "two"]
    assert place.statuses() == {"one": "trained", "two": "interrupted"}
    place.order()
    assert place.start()[0] == 0
    assert place.calls() == ["two", "three"]


def test_what_a_killed_start_left_behind_is_waited_for(place: Place) -> None:
    place.order(two="be slow")
    process = starting(place)
    wait_for_call(place, "two")
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert place.statuses() == {"one": "trained"}
    code, said = place.start()
    assert code == 0
    assert f"still trains in {place.workdir}" in said
    # The trainer finds a finished run, which costs it nothing.
    assert place.calls() == ["one", "two", "two", "three"]
    assert (place.workdir / "two.log").read_text() == "training two\n" * 2


def test_mistakes_that_concern_all_variants(place: Place) -> None:
    for arguments, expected in (
        (["--variants=tinny"], "there is no 'tinny'; did you mean 'tiny'"),
        (["--variants=,"], "names none"),
        ([f"--variants=tiny,{ROOT / 'configs' / 'tiny.py'}"], "names 'tiny' twice"),
        (["--preset=v5"], "--preset=v5 is not known; .*all: cpu, h200"),
        (["--preflight"], "--preflight needs --preset"),
        (["--config.train.stepz=3"], "did you mean 'steps'"),
    ):
        with pytest.raises(UserError, match=expected):
            place.start(*arguments)
    assert place.calls() == []


def test_a_dry_run_shows_everything_and_trains_nothing(place: Place) -> None:
    assert place.start(f"--variants={place.root / 'one.py'}")[0] == 0
    place.calls()
    before = sorted(path.name for path in place.workdir.iterdir())
    code, said = place.start("--dry-run", "--config.train.sequence_length=32")
    assert code == 0
    assert [line.rsplit("  ", 1)[1].strip()[:15] for line in said.splitlines()[2:5]] == [
        "to continue", "refused: config", "to train",
    ]  # fmt: skip
    assert f"--config={place.root / 'three.py'} --workdir={place.workdir / 'three'}" in said.splitlines()[-1]
    assert "trained already" in place.start("--dry-run")[1]
    assert sorted(path.name for path in place.workdir.iterdir()) == before
    assert place.calls() == []


def test_the_six_are_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_all_variants.main([f"--workdir={tmp_path}", "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:8]]
    assert [row[:2] for row in rows] == [
        ["tiny", "100,682,496"], ["small", "195,068,928"], ["medium", "304,137,216"],
        ["tiny_lc", "100,682,496"], ["small_lc", "195,068,928"], ["medium_lc", "304,137,216"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_makes_batches_that_divide_over_its_devices(name: str) -> None:
    preset = find_preset(name)
    for variant in train_all_variants.VARIANTS:
        file = str(ROOT / "configs" / f"{variant}.py")
        plain = load_config(file, [])
        config = load_config(file, preset_overrides(preset, plain))
        assert config.mesh.data == preset.devices
        assert config.train.batch_size % config.train.microbatch_rows == 0
        assert config.train.microbatch_rows % preset.devices == 0
        assert config.train.sequence_length == plain.train.sequence_length
        if not preset.batch_tokens:
            assert plain.train.batch_size <= config.train.batch_size < 2 * plain.train.batch_size + 256


def test_a_preset_yields_to_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--workdir={tmp_path}", "--variants=tiny", "--preset=h200x8", "--dry-run"]
    assert train_all_variants.main([*given, "--config.train.batch_size=64"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[2:6] == ["20000", "64", "64", "2048"]
    assert train_all_variants.main([*given, "--config.train.sequence_length=512"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[2:6] == ["20000", "128", "128", "512"]
