"""The Hugging Face folder, read: what `write` or `transformers` wrote, Llama or GPT-2."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax import config as config_module
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.huggingface import record, weights
from smallcoder_jax.models import build

CONFIG = "config.json"
_LIMITS = {int: (1, 2**31 - 1), float: (0, 1e30)}  # of the numbers in config.json


class Export(NamedTuple):
    """What a folder holds. `params`: unrolled, float32, numpy. `tokenizer_folder` is what `load_tokenizer` reads."""

    model: ModelConfig
    params: build.Params
    tokenizer_folder: Path


def read_export(folder: Path) -> Export:
    """Reads a folder that `write_export` or `transformers` wrote, Llama or GPT-2, old and new spelling of the rotation.

    Raises UserError that names the file and the field or tensor that is missing, unknown, of another shape or type, or
    asks for something that the decoder does not compute; and a file of an export that has changed since.
    """
    record.verify(folder)
    settings = _read_json(folder / CONFIG)
    model = _READERS[_one_of(folder, settings, "model_type", sorted(_READERS))](_Settings(folder / CONFIG, settings))
    try:
        # Whatever the context: nothing is trained or sampled here.
        train, evaluation = config_module.TrainConfig(sequence_length=1), config_module.EvalConfig(sample_tokens=0)
        config_module.validate(config_module.Config(model=model, train=train, eval=evaluation))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    return Export(model, weights.read(folder, model), folder)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The fields of a config.json, with errors that name it."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; where it is absent or null `default`, and without one a UserError."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{self.path}: {key} is {_shown(value)}; expected a value of type {kind.__name__}")
        if kind in _LIMITS and not _LIMITS[kind][0] <= value <= _LIMITS[kind][1]:
            least, most = _LIMITS[kind]
            raise UserError(f"{self.path}: {key} is {_shown(value)}; expected at least {least} and at most {most}")
        return float(value) if kind is float else value

    def insist(self, key: str, default: Any, *supported: Any) -> None:
        """Refuses what the decoder does not compute."""
        value = self.values.get(key, default)
        if value not in supported:
            raise UserError(f"{self.path}: {key} is {_shown(value)}; supported: {', '.join(map(repr, supported))}")


def _read_llama(settings: _Settings) -> ModelConfig:
    width, heads = settings.get("hidden_size", int), settings.get("num_attention_heads", int)
    settings.insist("hidden_act", "silu", "silu")
    biased = settings.get("attention_bias", bool, False)
    if settings.get("mlp_bias", bool, False) != biased:
        raise UserError(f"{settings.path}: attention_bias is {biased} and mlp_bias is not; supported: both or neither")
    return ModelConfig(
        vocab_size=settings.get("vocab_size", int),
        width=width,
        mlp_width=settings.get("intermediate_size", int),
        layers=settings.get("num_hidden_layers", int),
        heads=heads,
        kv_heads=settings.get("num_key_value_heads", int, heads),
        head_size=settings.get("head_dim", int, width // heads),
        context=settings.get("max_position_embeddings", int),
        rope_theta=_rope_theta(settings),
        norm="rmsnorm",
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        positions="rope",
        mlp="swiglu",
        bias="all" if biased else "none",
        embeddings="tied" if settings.get("tie_word_embeddings", bool, False) else "untied",
    )


def _rope_theta(settings: _Settings) -> float:
    """The rotation's base, spelled `rope_parameters` or `rope_theta` with `rope_scaling`."""
    thetas = []
    for key in ("rope_parameters", "rope_scaling"):
        rotation = settings.get(key, dict, {})
        kind = rotation.get("rope_type", rotation.get("type", "default"))
        others = sorted(rotation.keys() - {"rope_type", "type", "rope_theta"})
        if kind != "default" or others:
            raise UserError(
                f"{settings.path}: {key} is {_shown(rotation)}; supported: rope_type 'default' with a "
                "rope_theta. Positions that are scaled or partly rotated are not computed by this decoder"
            )
        thetas.append(_Settings(settings.path, rotation).get("rope_theta", float, 0.0))
    thetas.append(settings.get("rope_theta", float, 0.0))
    given = sorted({theta for theta in thetas if theta})
    if len(given) > 1:
        raise UserError(f"{settings.path} gives two values of rope_theta, {given[0]} and {given[1]}; leave one")
    return given[0] if given else 10_000.0


def _read_gpt2(settings: _Settings) -> ModelConfig:
    width, heads = settings.get("n_embd", int), settings.get("n_head", int)
    settings.insist("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    settings.insist("scale_attn_weights", True, True)
    settings.insist("scale_attn_by_inverse_layer_idx", False, False)
    settings.insist("add_cross_attention", False, False)
    return ModelConfig(
        vocab_size=settings.get("vocab_size", int),
        width=width,
        mlp_width=settings.get("n_inner", int, 4 * width),
        layers=settings.get("n_layer", int),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        context=settings.get("n_positions", int),
        norm="layernorm",
        norm_eps=settings.get("layer_norm_epsilon", float, 1e-5),
        positions="learned",
        mlp="gelu",
        bias="all",
        embeddings="tied" if settings.get("tie_word_embeddings", bool, True) else "untied",
        dropout=settings.get("resid_pdrop", float, 0.1),
    )


_READERS: dict[str, Callable[[_Settings], ModelConfig]] = {"llama": _read_llama, "gpt2": _read_gpt2}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "an exported model's folder; export or download the model again")


def _one_of(folder: Path, settings: Mapping[str, Any], key: str, known: list[str]) -> str:
    if settings.get(key) not in known:
        raise UserError(f"{folder / CONFIG}: {key} is {_shown(settings.get(key))}; supported: {', '.join(known)}")
    return settings[key]


def _shown(value: Any) -> str:
    """A value of unknown length as a message shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
