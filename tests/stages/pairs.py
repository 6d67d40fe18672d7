"""What the tests of both stages share that learn from preferences: a model to begin with, and pairs with a rule."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smallcoder_jax import loading, run
from smallcoder_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    PreferencesConfig,
    StageConfig,
    TokenizerConfig,
)
from tests.helpers import tiny_config, tiny_model

LENGTH = 48


def write_rule(path: Path, count: int = 400) -> None:
    """Answers of which the rejected one has a `#` or an `@` where the chosen one has a letter."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        answer = "".join(rng.choices("abcdefgh", k=rng.randint(6, 16)))
        place = rng.randrange(len(answer))
        sign = rng.choice("#@")
        rejected = answer[:place] + sign + answer[place + 1 :]
        criteria = {"#": "hash", "@": "at"}[sign]
        lines.append({"prompt": f"{number}:", "chosen": answer, "rejected": rejected, "criteria": criteria})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_root(root: Path) -> Path:
    """A folder with the pairs of `write_rule`, and `start`: a run of two steps on some code."""
    write_rule(root / "pairs.jsonl")
    (root / "code").mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    # adds {number} to x, which is a number\n    return x + {number}\n"
        (root / "code" / f"f{number:02d}.py").write_text(text)
    config = config_of(root, "pretrain")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run.train(dataclasses.replace(config, stage=StageConfig()), root / "start")
    return root


def config_of(root: Path, stage: Any, *, steps: int = 2, **changes: Any) -> Config:
    config = tiny_config(
        stage=StageConfig(name=stage, start=str(root / "start")),
        model=tiny_model(vocab_size=256, width=32, mlp_width=64, layers=1, heads=2, kv_heads=1, context=64),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(sources=f"dir:{root / 'code'}", dir=str(root / "data"), validation_fraction=0.2),
        preferences=PreferencesConfig(sources=f"jsonl:{root / 'pairs.jsonl'}"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0, schedule="constant"),
        eval=EvalConfig(every=0, batches=0, sample_tokens=0),
        checkpoint=CheckpointConfig(every=1, keep=10),
        log=LogConfig(tensorboard=False, charts_every=0),
    )
    train = dataclasses.replace(config.train, steps=steps, batch_size=16, sequence_length=LENGTH)
    return dataclasses.replace(config, train=train, **changes)


def assert_resumes(root: Path, config: Config, folder: Path) -> None:
    """A run of four steps, cut back to its second and continued, ends with the same bits."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    run.train(config, folder / "straight")
    shutil.copytree(folder / "straight", folder / "cut", symlinks=True)
    checkpoints = folder / "cut" / "checkpoints"
    (checkpoints / "best").unlink()
    for step in (3, 4):
        shutil.rmtree(checkpoints / str(step))
    assert run.train(config, folder / "cut").step == 4
    straight, again = (loading.load(folder / name, step=4) for name in ("straight", "cut"))
    jax.tree.map(np.testing.assert_array_equal, straight.params, again.params)
    begun = loading.load(root / "start").params
    kernels = [params["blocks"][0]["mlp"]["up"]["kernel"] for params in (straight.params, begun)]
    assert not np.array_equal(*kernels)
