"""The PyTorch side of the benchmarks of byte-level models: the plain PyTorch code of their exports.

It is made to train here: ternary layers get the straight-through gradients of BitNet b1.58 (arXiv 2402.17764), written
as its authors write them, with `detach`. As with the other contenders, a row is one text, whatever its documents are.
Routers learn through the shares of their chunks alone, not through their confidence as well, which is less work.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from typing import Any

from smallcoder_jax.config import Config, HnetConfig

PACKAGE = "smallcoder_jax.models.hnet.exported"


def build_model(model: HnetConfig, seed: int) -> Any:
    """The exported code's model with random weights of the size that ours begin with; the routers are the identity, so
    that as many chunks begin as in ours. Imports torch and transformers."""
    torch = importlib.import_module("torch")
    configuration, layers, modeling = (
        importlib.import_module(f"{PACKAGE}.{part}_smallcoder_hnet") for part in ("configuration", "layers", "modeling")
    )
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    torch.manual_seed(seed)
    built = modeling.SmallcoderHnetForCausalLM(configuration.SmallcoderHnetConfig(**known))
    for name, module in built.named_modules():
        if name.endswith(("router.query", "router.key")):
            torch.nn.init.eye_(module.weight)
        elif isinstance(module, layers.BitLinear):
            torch.nn.init.normal_(module.weight, std=module.inputs**-0.5)
    return built.eval()


def build_trainer(config: Config) -> tuple[Any, Any, Any]:
    """torch; a module of the same parameters that computes the mean loss of tokens and targets, [B, T] each; and what
    calls it with a microbatch."""
    torch = importlib.import_module("torch")
    layers = importlib.import_module(f"{PACKAGE}.layers_smallcoder_hnet")
    assert isinstance(config.model, HnetConfig)

    class Trainer(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, tokens_BT: Any, targets_BT: Any) -> Any:
            row = layers.make_row(torch.ones_like(tokens_BT, dtype=torch.bool), {})
            states_BTD = self.model.stage(self.model.embed(tokens_BT), row, {}, [])
            logits_XV = self.model.head(states_BTD).float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits_XV, targets_BT.flatten())

    def straight_through(self: Any, x_BTI: Any) -> Any:
        """A ternary layer whose rounding is the identity in the backward pass."""
        x_BTI = layers.rms_norm(x_BTI, self.gain)
        scale_BT1 = layers.LARGEST / x_BTI.abs().amax(dim=-1, keepdim=True).clamp(min=layers.SMALLEST)
        rounded_BTI = (x_BTI * scale_BT1).round().clamp(-128.0, layers.LARGEST) / scale_BT1
        unit = self.weight.abs().mean().clamp(min=layers.SMALLEST)
        rounded_OI = (self.weight / unit).round().clamp(-1.0, 1.0) * unit
        kernel_OI = self.weight + (rounded_OI - self.weight).detach()
        return torch.nn.functional.linear(x_BTI + (rounded_BTI - x_BTI).detach(), kernel_OI)

    trainer = Trainer(build_model(config.model, config.train.seed))
    for module in trainer.modules():
        if isinstance(module, layers.BitLinear):
            module.forward = types.MethodType(straight_through, module)
    return torch, trainer, lambda model, part: model(part["tokens"], part["targets"])
