"""The byte-level contender computes our loss and our gradients, straight through the rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallcoder_jax.config import Config, HnetConfig, default_config, from_config_dict
from smallcoder_jax.mesh import flat_tokens
from smallcoder_jax.models import build
from smallcoder_jax.models.hnet import published
from smallcoder_jax.ops.cross_entropy import token_losses
from tests.helpers import FLOAT32
from tools.bench import hnet_torch, step_timing, step_torch

pytestmark = pytest.mark.usefixtures("standard_promotion")


def config_of(*inner_widths: int) -> Config:
    config = default_config("hnet")
    around = (1,) * len(inner_widths)
    config.model.update(width=32, inner_widths=inner_widths, encoder_blocks=around, decoder_blocks=around, blocks=1)
    config.model.context = 64
    config.eval.sample_tokens = 0
    config.compute.dtype, config.tokenizer.kind = "float32", "bytes"
    config.train.update(steps=3, batch_size=2, sequence_length=32, microbatch_size=0)
    return from_config_dict(config)


@pytest.mark.parametrize("inner_widths", [(), (48,)])
def test_it_computes_our_loss_and_gradients(inner_widths: tuple[int, ...]) -> None:
    """Gradients of a flat model: with stages, ours has a further path of gradients, through the routers' confidence."""
    import torch

    config = config_of(*inner_widths)
    model = config.model
    assert isinstance(model, HnetConfig)
    params = build.init_params(model, FLOAT32, jax.random.key(0))
    batch = step_timing.random_batches(config, None)[0]
    _, trainer, loss_of = hnet_torch.build_trainer(config)
    weights = dict(trainer.model.named_parameters())
    tensors = published.tensors(model)
    assert len(tensors) == len(weights)

    def of(tree: Any, path: Any) -> np.ndarray:
        for name in path:
            tree = tree[name]
        return np.asarray(tree)

    with torch.no_grad():
        for tensor in tensors:
            value = of(params, tensor.ours[0])
            weights[tensor.name].copy_(torch.from_numpy(np.array(value.T if tensor.transposed else value)))
    part = {name: torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "targets")}
    theirs = loss_of(trainer, part)
    theirs.backward()

    def loss(params: Any) -> Any:
        module = build.bind(build.abstract_model(model, FLOAT32)[0], params)
        states_BTD = module(*(jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))).states_BTD
        targets_X = flat_tokens(jnp.asarray(batch["targets"]))
        return jnp.mean(token_losses(flat_tokens(states_BTD), module.unembedding(), targets_X).nll_X)

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(theirs.detach()) == pytest.approx(float(ours), rel=1e-4)
    for tensor in tensors if not inner_widths else []:
        wanted = of(gradients, tensor.ours[0])
        found = weights[tensor.name].grad
        assert found is not None, tensor.name
        error = np.linalg.norm(found.numpy() - (wanted.T if tensor.transposed else wanted))
        assert error < 0.02 * np.linalg.norm(wanted), tensor.name


def test_its_steps_are_timed() -> None:
    config = config_of(48)
    found = step_torch.measure_torch("torch", config, 2, None, attention="causal", compile=False, autocast=False)
    assert len(found["step_seconds"]) == 2
    assert found["loss"] == pytest.approx(np.log(256), rel=0.1)
    assert "torch" in found["software"]
