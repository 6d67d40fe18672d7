"""Configs and models for rollouts: tiny, random, over bytes."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from smallcoder_jax.config import Config, MeshConfig
from smallcoder_jax.mesh import make_mesh, params_sharding
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.sharding import RULES
from smallcoder_jax.models.heads import init_head
from smallcoder_jax.rl.rollouts import Question, RolloutEngine
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import FLOAT32
from tests.rl.tiny import rl_config


class World:
    """A policy with a critic, its engine, and questions of different lengths."""

    def __init__(self, config: Config):
        self.config = config
        self.mesh = make_mesh(MeshConfig(), config.model, config.train.microbatch_rows)
        self.tokenizer = ByteTokenizer()
        self.start = build.init_params(config.model, FLOAT32, jax.random.key(1))
        self.engine = RolloutEngine(config, self.tokenizer, self.start)
        self.questions = [
            Question((self.tokenizer.bos_id, *self.tokenizer.encode("x" * (number % 5) + f"={number}")))
            for number in range(20)
        ]

    @property
    def placed_start(self) -> Any:
        scanned = self.config.compute.layers == "scan"
        params = {"model": build.to_scanned(self.start) if scanned else self.start}
        return jax.device_put(params, params_sharding(self.mesh, params, RULES))

    def policy(self, seed: int = 2) -> Any:
        """Parameters that differ from the start, placed as those of a training state."""
        own = build.init_params(self.config.model, self.config.compute, jax.random.key(seed))
        critic = build.init_params(self.config.model, self.config.compute, jax.random.key(seed + 100))
        head = init_head(self.config.model.width, jax.random.key(seed))
        params = {"model": own, "critic": {"model": critic, "head": head}}
        return jax.device_put(params, params_sharding(self.mesh, params, RULES))


@pytest.fixture(scope="session")
def world() -> World:
    return World(rl_config())
