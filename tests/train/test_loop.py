"""The loop: what may be continued, signals while the last save is written, gradients that are logged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax import run
from smallcoder_jax.base import files
from smallcoder_jax.base.errors import Diverged, UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.base.terminal import Terminal
from smallcoder_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, LogConfig, TokenizerConfig
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.ops import cross_entropy
from smallcoder_jax.preflight.target import Target
from smallcoder_jax.report import log_files
from smallcoder_jax.report.log_files import read_csv
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.stages import pretrain
from smallcoder_jax.train import loop
from smallcoder_jax.train.checkpoint import Checkpointer
from tests.helpers import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")


def config_of(root: Path) -> Config:
    config = tiny_config(
        model=tiny_model(vocab_size=256, layers=1),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2),
        eval=EvalConfig(every=0, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(tensorboard=False, charts_every=0),
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `code`, `data` and a run of two steps, `run`."""
    root = tmp_path_factory.mktemp("loop")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert run.train(config_of(root), root / "run").step == 2
    return root


@contextlib.contextmanager
def trainer_in(folder: Path, config: Config) -> Iterator[loop.Trainer]:
    with RunFolder(folder).locked(), (folder / "terminal").open("w") as terminal:
        shown = Terminal(terminal, total_steps=config.train.steps, log_every=1)
        trainer = loop.Trainer(config, RunFolder(folder), pretrain.make_task(config, None, Progress(terminal)), shown)
        yield trainer


def changed(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_checkpoints_that_came_without_their_run_json_are_of_a_run_too(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run" / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    config = config_of(root)
    for other, named in {
        changed(config, "train", seed=5): "train.seed: the run has 0, now 5",
        changed(config, "optimizer", name="muon"): "optimizer.name: the run has 'adamw', now 'muon'",
    }.items():
        with pytest.raises(UserError, match=f"holds another run(.|\n)*{named}"):
            run.train(other, tmp_path)
    assert not (tmp_path / "run.json").exists()
    assert run.train(config, tmp_path).step == 2  # and the refusals have let go of the folder


def test_a_run_does_not_go_on_with_other_products(root: Path, tmp_path: Path) -> None:
    """Nor on another machine, where `auto` is something else."""
    config = changed(changed(config_of(root), "compute", matmul="mixed"), "checkpoint", every=2)
    with trainer_in(tmp_path, config) as trainer:
        trainer.run()
    assert "products          mixed (asked for)" in (tmp_path / "terminal").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["matmul"] == {"kind": "mixed", "reason": "asked for"}
    with pytest.raises(UserError, match=r"compute\.matmul: the run has 'mixed'"):
        run.train(changed(config, "compute", matmul="exact"), tmp_path)
    assert run.train(config, tmp_path).step == 2


def test_a_run_json_without_an_identity_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"tensorboard": "off"}')
    with pytest.raises(UserError, match="the identity of a run is a JSON object"):
        run.train(config_of(root), tmp_path)


def test_data_that_are_not_those_that_were_prepared_end_a_run_before_it_is_saved(root: Path, tmp_path: Path) -> None:
    """Other tokens in a file that is sound in itself and of the same size, under the old manifest."""
    data = shutil.copytree(root / "data", tmp_path / "data")
    (shard,) = data.glob("tokens/*/*train*.array_record")
    documents = [ids[::-1] for ids in shards.read_records(shard.parent, [shard.name], "uint16")]
    source = shards.SourceTokens("other", 1.0, True, [(ids, 1) for ids in documents], [(documents[0], 1)])
    shards.write_tokens(tmp_path / "other", [source], vocab_size=256, tokenizer_hash="", tokenizer="")
    shutil.copy(tmp_path / "other" / shard.name, shard)
    with pytest.raises(UserError, match=rf"{shard} is damaged or was changed since it was prepared"):
        run.train(changed(config_of(root), "data", dir=str(data)), tmp_path / "run")
    with RunFolder(tmp_path / "run").locked():
        assert Checkpointer(tmp_path / "run" / "checkpoints", 3).steps() == []


def test_sigterm_while_the_last_save_is_written_waits_for_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: outside.append(number))
    wait = Checkpointer.wait

    def wait_under_fire(checkpointer: Checkpointer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait(checkpointer)

    monkeypatch.setattr(Checkpointer, "wait", wait_under_fire)
    config = changed(config_of(root), "checkpoint", every=2)
    try:
        with trainer_in(tmp_path, config) as trainer:
            outcome = trainer.run()
            assert outside == []
            assert trainer.checkpointer.steps() == [2]
            assert not outcome.interrupted  # there is nothing left to continue
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_while_the_step_is_compiled_is_answered_at_once(root: Path, tmp_path: Path) -> None:
    config = changed(config_of(root), "checkpoint", every=2)
    with trainer_in(tmp_path, config) as trainer:
        lower = trainer.train_step.lower

        class Slow:
            def lower(self, *given: Any) -> Any:
                os.kill(os.getpid(), signal.SIGINT)
                heard.append((tmp_path / "terminal").read_text())
                return lower(*given)

        heard: list[str] = []
        trainer.train_step = Slow()
        assert trainer.run().interrupted
        assert trainer.checkpointer.steps() == [1]
    assert heard[0].endswith(
        "asked to stop: the run is saved and ends after compiling the step, which can take minutes, and running it "
        "once. Ctrl-C now ends it at once: nothing is saved\n"
    )


def test_a_finished_run_that_is_started_again_changes_no_record(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "run", tmp_path / "run", symlinks=True)
    info = json.loads((folder / "training_info.json").read_text())
    (folder / "training_info.json").write_text(json.dumps({**info, "trained_at": "then"}))
    assert run.train(config_of(root), folder).step == 2
    assert json.loads((folder / "training_info.json").read_text()) == {**info, "trained_at": "then"}


@pytest.mark.parametrize("place", ["tokens.json", "metrics.jsonl", "checkpoints"])
def test_a_folder_without_an_inode_left_is_one_message(
    place: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / place))
    if place == "checkpoints":
        monkeypatch.setattr(Checkpointer, "_make_room", raises(full))
    else:
        write = files.write_bytes
        failing = lambda path, content: raises(full)() if path.name == place else write(path, content)  # noqa: E731
        for module in (files, log_files):
            monkeypatch.setattr(module, "write_bytes", failing)
    with pytest.raises(UserError, match=rf"{place} cannot be written: No space left on device.*df -i"):
        run.train(config_of(root), tmp_path)


def raises(error: Exception) -> Any:
    def call(*_: object) -> None:
        raise error

    return call


def test_a_failed_run_has_its_save_finished_before_the_folder_is_free(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Exception):
        pass

    def fail(*_: object) -> None:
        raise Broken

    monkeypatch.setattr(loop.Trainer, "_write_info", fail)
    monkeypatch.setattr(loop.Trainer, "_train", lambda trainer, stop: (trainer._save(False, 3), fail()))
    with pytest.raises(Broken):
        run.train(config_of(root), tmp_path)
    assert (tmp_path / "checkpoints" / "0" / "manifest.json").exists()
    with RunFolder(tmp_path).locked():
        assert Checkpointer(tmp_path / "checkpoints", 3).steps() == [0]


def test_a_run_that_diverges_keeps_its_last_sound_checkpoints(root: Path, tmp_path: Path) -> None:
    """With samples, which cannot be drawn from such a model."""
    config = changed(config_of(root), "train", steps=60)
    config = changed(config, "optimizer", learning_rate=1e3, clip_norm=0.0)
    config = changed(config, "eval", every=2, sample_tokens=4)
    config = changed(changed(config, "checkpoint", every=2, keep=1), "guard", max_skipped=7)
    with pytest.raises(
        Diverged, match=r"7 updates in a row were skipped.* The newest sound checkpoint is step (\d+)\."
    ):
        run.train(config, tmp_path)
    _, rows = read_csv(tmp_path / "eval_log.csv")
    finite = [row["step"] for row in rows if np.isfinite(row["loss"])]
    assert 2 <= finite[-1] < rows[-1]["step"]
    # The best, and the newest that was evaluated before the loss was no number any more.
    assert Checkpointer(tmp_path / "checkpoints", 9).steps() == sorted({2, finite[-1]})


def test_a_run_does_not_end_with_a_model_that_is_not_finite(root: Path, tmp_path: Path) -> None:
    with trainer_in(tmp_path, config_of(root)) as trainer:
        trainer.task = dataclasses.replace(trainer.task, summarise=lambda sums: {"loss": float("nan")})
        with pytest.raises(
            Diverged, match=r"loss of step 2, the last one, is not finite.* sound checkpoint is step 1\."
        ):
            trainer.run()
        assert trainer.checkpointer.steps() == [1]


def test_logged_gradients_are_per_token(root: Path, tmp_path: Path) -> None:
    with trainer_in(tmp_path, config_of(root)) as trainer:
        trainer.log.close()
        rows = next(iter(trainer.task.validation_batches(1, range(8))))
        batch = {key: jnp.asarray(value) for key, value in rows.items()}
        total = jax.grad(lambda params: trainer.task.loss_fn(params, batch, None)[0])(trainer.state.params)
        count = batch["loss_weights"].sum()
        assert count > 100
        for found, summed in zip(
            jax.tree.leaves(trainer.evaluator.gradient(trainer.state.params, rows)), jax.tree.leaves(total), strict=True
        ):
            np.testing.assert_allclose(found, np.asarray(summed) / count, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "shown"),
    [(0, "8 tokens at a time (0.00 GiB"), (cross_entropy.WHOLE_BYTES, "all tokens at once (0.00 GiB")],
)
def test_the_start_says_how_cross_entropy_is_computed(
    limit: int, shown: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", limit)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * 256 * 4)
    with trainer_in(tmp_path, config_of(root)) as trainer:
        assert trainer.run().step == 2
        recorded = trainer.folder.read_run_json()["cross_entropy"]
    line = f"cross-entropy     {shown} of logits per device, limit {limit / 2**30:.2f})"
    assert line in (tmp_path / "terminal").read_text()
    assert recorded["chunk"] == (None if limit else 8)


def test_want_of_memory_is_explained(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(loop.Trainer, "_train", run_out)
    with pytest.raises(UserError, match=r"out of memory: .*99 bytes(.|\n)*peak(.|\n)*by this estimate the step fits"):
        run.train(config_of(root), tmp_path)
    monkeypatch.setattr(run, "target_here", lambda devices: Target("cpu", devices, 1024.0, "what this test allows"))
    with pytest.raises(UserError, match=r"fits +NO(.|\n)*nothing that was tried fits"):
        run.train(config_of(root), tmp_path)


def test_other_failures_of_the_device_are_left_as_they_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(loop.Trainer, "_train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run.train(config_of(root), tmp_path)


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("data", {"packing": "best_fit"}, r"data\.\S*: the run has 'concat', now 'best_fit'"),
        ("data", {"workers": 1}, r"data\.\S*workers: the run has 0, now 1"),
        ("data", {"fim_rate": 0.25}, r"data\.\S*fim_rate: the run has 0.5, now 0.25"),
        ("data", {"validation_fraction": 0.3}, r"data\.fingerprint: the run has '\w+', now '\w+'"),
        ("train", {"seed": 5}, r"train\.seed: the run has 0, now 5"),
        ("guard", {"spike_sigma": 6.0}, r"guard\.spike_sigma: the run has 0.0, now 6.0"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(
    section: str, value: dict[str, Any], named: str, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "run", tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match=rf"holds another run(.|\n)*{named}"):
        run.train(changed(config_of(root), section, **value), tmp_path / "run")


def test_the_steps_that_are_asked_for_are_traced_and_no_others(root: Path, tmp_path: Path) -> None:
    config = changed(config_of(root), "train", steps=5)
    config = changed(config, "log", profile_steps="2:4")
    with trainer_in(tmp_path, config) as trainer:
        trainer.run()
    assert "step 3: a trace is in" in (tmp_path / "terminal").read_text()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [2, 3]
    assert any(event.name.startswith("dot") for event in events)  # operations of the step


@pytest.mark.slow
def test_a_run_that_ends_in_the_middle_of_a_trace_writes_it(root: Path, tmp_path: Path) -> None:
    config = changed(config_of(root), "log", profile_steps="2:9")
    with trainer_in(tmp_path, config) as trainer:
        trainer.run()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
