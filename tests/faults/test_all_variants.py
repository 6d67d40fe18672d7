"""All six variants with their true widths, heads and vocabulary, one layer deep, on a CPU: one is made to fail, the
command is killed in the middle, and started again it does the rest; then the verifier looks at all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from smallcoder_jax.base.errors import EXIT_CHECK_FAILED
from smallcoder_jax.configfile import load_config
from smallcoder_jax.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer, train_sentencepiece
from tools.train_all_variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 540.0  # seconds for all that a start does, on a busy machine
STEPS = 3
SHORT = {
    "model.layers": 1, "train.sequence_length": 128, "train.batch_size": 4, "train.microbatch_size": 0,
    "train.log_every": 1, "compute.dtype": "float32", "optimizer.warmup_steps": 0, "optimizer.learning_rate": 5e-3,
    "optimizer.schedule": "constant", "data.validation_fraction": 0.2, "eval.batches": 2, "eval.sample_tokens": 0,
    "checkpoint.every": 2, "checkpoint.keep": 1, "log.tensorboard": False, "log.charts_every": 0,
}  # fmt: skip


def full_vocabulary(texts: list[str], size: int, folder: Path) -> None:
    """A tokenizer with as many entries as the variants have, of which texts this short use some: the rest are words
    that never occur, since training so many takes more text and more time."""
    train_sentencepiece(texts, 1000, 1 << 20).save(folder)
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString((folder / MODEL_FILE).read_bytes())
    for number in range(len(proto.pieces), size):
        proto.pieces.add(piece=f"never{number}", score=-float(number))
    proto.trainer_spec.vocab_size = size
    tokenizer = SentencePieceTokenizer(proto.SerializeToString())
    assert tokenizer.vocab_size == size
    tokenizer.save(folder)


class All:
    """Starts the command in a folder with code and a tokenizer."""

    def __init__(self, root: Path):
        self.root, self.workdir = root, root / "all"
        texts = []
        for number, path in enumerate(sorted((ROOT / "smallcoder_jax").rglob("*.py"))[:40]):
            target = root / "code" / f"repository_{number % 4}" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            texts.append(path.read_text())
        full_vocabulary(texts, 32768, root / "tokenizer")

    def overrides(self) -> list[str]:
        places = {"data.sources": f"dir:{self.root / 'code'}", "data.dir": self.root / "data"}
        values = {**SHORT, **places, "tokenizer.path": self.root / "tokenizer"}
        return [f"--config.{key}={value}" for key, value in values.items()]

    def start(self) -> subprocess.Popen[str]:
        # What a user has: one device, the default strictness.
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
        clean |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.root / "xla")}
        command = [
            *(sys.executable, "-m", "tools.train_all_variants", f"--workdir={self.workdir}", f"--steps={STEPS}"),
            *("--num-samples=40", *self.overrides()),
        ]
        return subprocess.Popen(
            command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, code: int) -> str:
        process = self.start()
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, said
        return said

    def kill_in(self, variant: str) -> None:
        """kill -9 of the command, and of what it started, once the variant has saved for the first time."""
        process = self.start()
        manifest = self.workdir / variant / "checkpoints" / "2" / "manifest.json"
        deadline = time.monotonic() + PATIENCE
        while not manifest.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        process.communicate(timeout=PATIENCE)

    def results(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.workdir / "training_summary.json").read_text())["results"]

    def starts(self, variant: str) -> int:
        """How often a process trained in the variant's folder."""
        return len(json.loads((self.workdir / variant / "run.json").read_text())["starts"])


@pytest.mark.slow
def test_six_variants_one_of_which_fails_through_a_kill(tmp_path: Path) -> None:
    place = All(tmp_path)
    place.workdir.mkdir()
    (place.workdir / "medium").write_text("in the way of the run folder")
    place.kill_in("small")
    assert {variant: result["status"] for variant, result in place.results().items()} == {"tiny": "trained"}
    said = place.finish(EXIT_CHECK_FAILED)
    assert "check failed: " in said
    assert f"medium failed: {place.workdir / 'medium'} cannot be written" in said
    assert "resuming at step 2 of" in (place.workdir / "small.log").read_text()
    failed = place.results().pop("medium")
    assert (failed["status"], failed["exit_code"]) == ("failed", 2)
    assert (place.workdir / "medium").is_file()

    (place.workdir / "medium").unlink()
    place.finish(0)
    assert [place.starts(variant) for variant in VARIANTS] == [1, 2, 1, 1, 1, 1]
    for variant, result in place.results().items():
        config = load_config(str(ROOT / "configs" / f"{variant}.py"), place.overrides())
        assert (result["status"], result["steps"]) == ("trained", STEPS)
        assert result["parameters"] == config.model.parameter_count()
        assert result["parameters"] > 32768 * config.model.width
        verdict = result["verification"]
        assert (verdict["status"], verdict["step"]) == ("verified", STEPS), verdict
        assert verdict["bits_per_byte"] == pytest.approx(verdict["recorded_bits_per_byte"], rel=1e-2)
    assert list(place.results()) == ["tiny", "small", "medium", "tiny_lc", "small_lc", "medium_lc"]
