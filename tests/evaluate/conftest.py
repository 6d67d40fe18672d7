"""A model that was really trained, for a second, on generated functions."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from smallcoder_jax import run
from smallcoder_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from tests.helpers import FLOAT32, tiny_model


def small_config(root: Path) -> Config:
    return Config(
        name="small",
        model=tiny_model(vocab_size=256, context=128),
        compute=FLOAT32,
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(sources=f"dir:{root / 'code'}", dir=str(root / "data")),
        train=TrainConfig(steps=24, batch_size=8, sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        eval=EvalConfig(every=0, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every=12),
        log=LogConfig(tensorboard=False, charts_every=0),
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `code`, `data` and the run `run`."""
    root = tmp_path_factory.mktemp("trained")
    (root / "code").mkdir()
    for i in range(80):
        functions = [f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(12)]
        (root / "code" / f"module_{i}.py").write_text("\n".join(functions))
    # optax mixes types and ranks, which the strict settings of the tests refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(small_config(root), root / "run")
    return root
