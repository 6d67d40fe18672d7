"""The config of a tiny model that answers."""

from __future__ import annotations

from typing import Any

from smallcoder_jax.config import Config, RLConfig, StageConfig, TrainConfig
from tests.helpers import tiny_config, tiny_model


def rl_config(stage: Any = "ppo", **rl: Any) -> Config:
    settings = {"questions": 8, "group_size": 2, "answer_tokens": 8, "inner_epochs": 2, **rl}
    return tiny_config(
        stage=StageConfig(name=stage, start="somewhere"),
        model=tiny_model(vocab_size=256, width=32, mlp_width=48, layers=1, heads=2, kv_heads=1, context=48),
        train=TrainConfig(steps=4, batch_size=8, sequence_length=32, log_every=1),
        rl=RLConfig(**settings),
    )
