"""The published format of byte-level models. transformers has no architecture that computes them, so an export brings
its code (`exported`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import HnetConfig
from smallcoder_jax.config.hnet import mlp_width
from smallcoder_jax.models.hnet.model import Hnet
from smallcoder_jax.models.published import ParamPath, Published, Settings, Tensor, shown

MODEL_TYPE = "smallcoder_hnet"
_FOLDER = Path(__file__).parent / "exported"
_CODE = tuple(_FOLDER / f"{part}_{MODEL_TYPE}.py" for part in ("configuration", "layers", "modeling"))
_NUMBERS = ("vocab_size", "context", "width", "blocks", "expand_ratio", "conv_size", "heads", "kv_heads", "window")
_REALS = ("rope_theta", "chunk_target", "ratio_weight", "capacity")
_SEQUENCES: dict[str, type] = {
    "inner_widths": int,
    "encoder_blocks": int,
    "decoder_blocks": int,
    "ternary": bool,
    "stage_rates": float,
}
# The last name of our parameters: the last name of the exported code's, and whether it is transposed there.
_NAMES = {
    "embedding": ("weight", False),
    "kernel": ("weight", True),
    "bias": ("bias", False),
    "scale": ("weight", False),
    "gain": ("gain", False),
    "taps": ("taps", False),
    "wider": ("wider", False),
}


def settings(model: HnetConfig) -> dict[str, Any]:
    module = f"modeling_{MODEL_TYPE}.SmallcoderHnetForCausalLM"
    return {
        "architectures": ["SmallcoderHnetForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"configuration_{MODEL_TYPE}.SmallcoderHnetConfig",
            "AutoModelForCausalLM": module,
        },
        "tie_word_embeddings": False,
        **{name: getattr(model, name) for name in (*_NUMBERS, *_REALS, "conv", "pattern")},
        **{name: list(getattr(model, name)) for name in _SEQUENCES},
    }


def read(settings: Settings) -> HnetConfig:
    settings.insist("conv", "shared", "shared", "separate")
    settings.insist("tie_word_embeddings", False, False)
    values = {name: settings.get(name, int, least=0) for name in _NUMBERS}  # `HnetConfig` checks them
    reals = {name: settings.get(name, float) for name in _REALS}
    sequences = {name: _sequence(settings, name, kind) for name, kind in _SEQUENCES.items()}
    given: dict[str, Any] = {**values, **reals, **sequences}
    return HnetConfig(**given, conv=settings.values.get("conv", "shared"), pattern=settings.get("pattern", str))


def _sequence(settings: Settings, name: str, kind: type) -> tuple[Any, ...]:
    values = settings.get(name, list)
    if not all(type(value) is kind or (kind is float and type(value) is int) for value in values):
        raise UserError(f"{settings.path}: {name} is {shown(values)}; expected a list of {kind.__name__}")
    return tuple(values)


def tensors(model: HnetConfig) -> list[Tensor]:
    ternary = {path[:-1] for path in shapes(model) if path[-1] == "gain"}  # of a ternary layer, and of no other
    return [_tensor(path, path[:-1] in ternary) for path in shapes(model)]


def _tensor(path: ParamPath, ternary: bool) -> Tensor:
    if path[-2:-1] == ("router",):
        return Tensor(".".join(map(str, path)) + ".weight", (path,), transposed=True)
    name, transposed = _NAMES[str(path[-1])]
    return Tensor(".".join(map(str, (*path[:-1], name))), (path,), transposed, ternary and path[-1] == "kernel")


def shapes(model: HnetConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of `model` in the unrolled layout, computed from the config alone; a test compares
    it with the model itself."""
    found: dict[ParamPath, tuple[int, ...]] = {("embed", "embedding"): (model.vocab_size, model.width)}
    path: ParamPath = ("stage",)
    for stage, within in enumerate(model.inner_widths):
        width = model.widths[stage]
        found |= _stack(model, stage, (*path, "encoder"), "x" * model.encoder_blocks[stage])
        found |= {(*path, "router", name): (width, width) for name in ("query", "key")}
        found |= {(*path, "residual", "kernel"): (width, width), (*path, "residual", "bias"): (width,)}
        found |= {(*path, "wider"): (within - width,)}
        found |= _stack(model, stage, (*path, "decoder"), "x" * model.decoder_blocks[stage])
        path = (*path, "inner")
    found |= _stack(model, len(model.inner_widths), (*path, "stack"), model.kinds)
    return found | _projection(model, 0, ("head",), model.width, model.vocab_size)


def _stack(model: HnetConfig, stage: int, path: ParamPath, kinds: str) -> dict[ParamPath, tuple[int, ...]]:
    width, found = model.widths[stage], {}
    for number, kind in enumerate(kinds):
        block: ParamPath = (*path, "blocks", number)
        found |= {(*block, name, "scale"): (width,) for name in ("mixer_norm", "mlp_norm")}
        mixer: ParamPath = (*block, "mixer")
        found |= _attention(model, (*mixer, "attention")) if kind == "a" else _recurrence(model, stage, mixer)
        hidden = mlp_width(width)
        found |= _projection(model, stage, (*block, "mlp", "up"), width, 2 * hidden)
        found |= _projection(model, stage, (*block, "mlp", "down"), hidden, width)
    return found | {(*path, "final_norm", "scale"): (width,)}


def _attention(model: HnetConfig, path: ParamPath) -> dict[ParamPath, tuple[int, ...]]:
    shape = model.attention()
    q_width, kv_width = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    outputs = {"query": q_width, "key": kv_width, "value": kv_width}
    found: dict[ParamPath, tuple[int, ...]] = {
        (*path, name, "kernel"): (shape.width, size) for name, size in outputs.items()
    }
    return found | {(*path, "output", "kernel"): (q_width, shape.width)}


def _recurrence(model: HnetConfig, stage: int, path: ParamPath) -> dict[ParamPath, tuple[int, ...]]:
    width, expanded = model.widths[stage], model.widths[stage] * model.expand_ratio
    found: dict[ParamPath, tuple[int, ...]] = {(*path, "gate_norm", "scale"): (expanded,)}
    for name in ("forget", "value", "gate"):
        found |= _projection(model, stage, (*path, name), width, expanded)
    found |= _projection(model, stage, (*path, "output"), expanded, width)
    if not model.conv_size:
        return found
    channels = {"conv": width} if model.conv == "shared" else {"forget_conv": expanded, "value_conv": expanded}
    return found | {(*path, name, "taps"): (model.conv_size, size) for name, size in channels.items()}


def _projection(
    model: HnetConfig, stage: int, path: ParamPath, inputs: int, outputs: int
) -> dict[ParamPath, tuple[int, ...]]:
    gain: dict[ParamPath, tuple[int, ...]] = {(*path, "gain"): (inputs,)} if model.is_ternary(stage) else {}
    return gain | {(*path, "kernel"): (inputs, outputs)}


def stored(model: HnetConfig, where: Path, held: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Every tensor has its published name. Raises UserError when config.json says more blocks than there are
    tensors."""
    blocks = model.blocks + sum(model.encoder_blocks) + sum(model.decoder_blocks)
    if blocks > len(held):
        raise UserError(f"config.json says {blocks:,} blocks, but {where} holds {len(held):,} tensors in all")
    return {name: name for name in held}


def describe(model: HnetConfig) -> tuple[str, dict[str, str]]:
    table = {"stages": model.summary(), "recurrence": f"HGRN, {model.expand_ratio} times as wide as its stage"}
    if model.conv_size:
        table["convolution"] = f"over {model.conv_size} positions, {model.conv}"
    if "a" in model.kinds:
        seen = f"the last {model.window}" if model.window else "all"
        table["attention"] = f"{model.heads} query, {model.kv_heads} key-value heads, over {seen} chunks"
    return "A byte-level model of ternary recurrences", table


PUBLISHED = Published(
    model_type=lambda model: MODEL_TYPE,
    readers={MODEL_TYPE: read},
    settings=settings,
    tensors=tensors,
    shapes=shapes,
    stored=stored,
    tied=lambda model: None,
    describe=describe,
    code=_CODE,
    decide=Hnet.decide,
)
