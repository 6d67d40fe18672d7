"""The one name map per published family, used in both directions.

A `Tensor` says which tensor of the published file holds which of our parameters. Ours are [in, out]; torch's Linear is
[out, in], GPT-2's Conv1D is [in, out] and keeps query, key and value in one tensor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.models import build

ParamPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Published tensor `name` holds the parameters at `ours`, side by side along their last axis, transposed or not."""

    name: str
    ours: tuple[ParamPath, ...]
    transposed: bool = False


def family(model: ModelConfig) -> str:
    """`llama` or `gpt2`: the published architecture that computes what `model` computes.

    Raises UserError that names the fields which neither can express. Dropout acts in training only and decides nothing.
    """
    llama = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"}
    gpt2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": "all"}
    if model.window:
        raise UserError(
            f"{model.window=}: neither Llama nor GPT-2 in transformers has a sliding window, so this model cannot be "
            "exported; train it with model.window=0"
        )
    differing = {name: _differing(model, wanted) for name, wanted in (("llama", llama), ("gpt2", gpt2))}
    name = min(differing, key=lambda candidate: len(differing[candidate]))
    if differing[name]:
        raise UserError(
            "this model cannot be exported to transformers: "
            + "; ".join(f"{candidate} needs {', '.join(fields)}" for candidate, fields in differing.items())
        )
    if name == "gpt2":
        _check_gpt2_heads(model)
    elif model.width % model.heads:
        raise UserError(f"{model.width=} is no multiple of {model.heads=}, which Llama in transformers insists on")
    return name


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every tensor of the published file of `model`, which together hold every parameter exactly once."""
    return _FAMILIES[family(model)](model)


def to_published(model: ModelConfig, params: build.Params) -> dict[str, np.ndarray]:
    """Unrolled parameters to named tensors. Raises UserError where `params` are not those of `model`."""
    shapes, given = expected_shapes(model), _flatten(params)
    if missing := sorted(map(_text, shapes.keys() - given.keys())):
        raise UserError(f"parameters lack {_some(missing)}; expected those of {model}")
    if unknown := sorted(map(_text, given.keys() - shapes.keys())):
        raise UserError(f"parameters hold {_some(unknown)}, which {model} does not have")
    published = {}
    for tensor in tensors(model):
        parts = [np.asarray(given[path]) for path in tensor.ours]
        for path, part in zip(tensor.ours, parts, strict=True):
            if part.shape != shapes[path]:
                raise UserError(f"parameter {_text(path)} has shape {part.shape}; expected {shapes[path]}")
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        published[tensor.name] = np.ascontiguousarray(joined.T if tensor.transposed else joined)
    return published


def stored_names(model: ModelConfig, found: Iterable[str]) -> dict[str, str]:
    """The name in `tensors(model)` of every parameter of a file, to the name that the file has for it.

    They differ in OpenAI's own GPT-2, whose names do not begin with `transformer.`. Old GPT-2 files also hold the
    causal mask, which is no parameter and is left out.
    """
    found = set(found)
    if family(model) != "gpt2":
        return {name: name for name in found}
    wanted = {tensor.name for tensor in tensors(model)} - found
    kept = [name for name in found if not _GPT2_MASK.search(name)]
    return {f"transformer.{name}" if f"transformer.{name}" in wanted else name: name for name in kept}


def from_published(
    model: ModelConfig, names: Iterable[str], shape: Callable[[str], Any], read: Callable[[str], np.ndarray]
) -> build.Params:
    """Named tensors to unrolled parameters.

    `names` are all that the file has, `shape` and `read` give one tensor's. Raises UserError that names tensors which
    are missing, unknown or of another shape.
    """
    shapes, wanted, found = expected_shapes(model), tensors(model), set(names)
    if missing := sorted({tensor.name for tensor in wanted} - found):
        raise UserError(f"the file lacks {_some(missing)}, which its config.json says it holds")
    if unknown := sorted(found - {tensor.name for tensor in wanted}):
        raise UserError(f"the file holds {_some(unknown)}, which no {family(model)} of its config.json has")
    params: build.Params = {}
    for tensor in wanted:
        parts = [shapes[path] for path in tensor.ours]
        joined = (*parts[0][:-1], sum(part[-1] for part in parts))
        expected = joined[::-1] if tensor.transposed else joined
        if tuple(shape(tensor.name)) != expected:
            raise UserError(f"tensor {tensor.name} has shape {tuple(shape(tensor.name))}; expected {expected}")
        value = read(tensor.name)
        value = value.T if tensor.transposed else value
        borders = np.cumsum([part[-1] for part in parts])[:-1]
        for path, part in zip(tensor.ours, np.split(value, borders, axis=-1), strict=True):
            _insert(params, path, np.ascontiguousarray(part))
    return params


def expected_shapes(model: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of `model` in the unrolled layout, from the model itself."""
    _, abstract = build.abstract_model(model, ComputeConfig(layers="unroll"))
    return {path: leaf.shape for path, leaf in _flatten(abstract).items()}


def _llama(model: ModelConfig) -> list[Tensor]:
    biased = model.bias == "all"
    found = [Tensor("model.embed_tokens.weight", (("embed", "embedding"),))]
    for i in range(model.layers):
        block: ParamPath = ("blocks", i)
        prefix = f"model.layers.{i}."
        found.append(Tensor(prefix + "input_layernorm.weight", ((*block, "attention_norm", "scale"),)))
        found.append(Tensor(prefix + "post_attention_layernorm.weight", ((*block, "mlp_norm", "scale"),)))
        for theirs, ours in _LLAMA_LINEAR.items():
            found.append(Tensor(f"{prefix}{theirs}.weight", ((*block, *ours, "kernel"),), transposed=True))
            if biased:
                found.append(Tensor(f"{prefix}{theirs}.bias", ((*block, *ours, "bias"),)))
    found.append(Tensor("model.norm.weight", (("final_norm", "scale"),)))
    return found + _head(model)


def _gpt2(model: ModelConfig) -> list[Tensor]:
    found = [
        Tensor("transformer.wte.weight", (("embed", "embedding"),)),
        Tensor("transformer.wpe.weight", (("position_embed", "embedding"),)),
    ]
    norm = {"weight": "scale", "bias": "bias"}
    linear = {"weight": "kernel", "bias": "bias"}
    for i in range(model.layers):
        block: ParamPath = ("blocks", i)
        prefix = f"transformer.h.{i}."
        for theirs, ours in {"ln_1": "attention_norm", "ln_2": "mlp_norm"}.items():
            found += [Tensor(f"{prefix}{theirs}.{kind}", ((*block, ours, mine),)) for kind, mine in norm.items()]
        for theirs, several in _GPT2_LINEAR.items():
            for kind, mine in linear.items():
                found.append(Tensor(f"{prefix}{theirs}.{kind}", tuple((*block, *ours, mine) for ours in several)))
    found += [Tensor(f"transformer.ln_f.{kind}", (("final_norm", mine),)) for kind, mine in norm.items()]
    return found + _head(model)


def _head(model: ModelConfig) -> list[Tensor]:
    untied = model.embeddings == "untied"
    return [Tensor("lm_head.weight", (("unembed", "kernel"),), transposed=True)] if untied else []


_FAMILIES: dict[str, Callable[[ModelConfig], list[Tensor]]] = {"llama": _llama, "gpt2": _gpt2}

_LLAMA_LINEAR: dict[str, ParamPath] = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.o_proj": ("attention", "output"),
    "mlp.gate_proj": ("mlp", "gate"),
    "mlp.up_proj": ("mlp", "up"),
    "mlp.down_proj": ("mlp", "down"),
}

_GPT2_MASK = re.compile(r"\.attn\.(masked_)?bias$")

_GPT2_LINEAR: dict[str, tuple[ParamPath, ...]] = {
    "attn.c_attn": (("attention", "query"), ("attention", "key"), ("attention", "value")),
    "attn.c_proj": (("attention", "output"),),
    "mlp.c_fc": (("mlp", "up"),),
    "mlp.c_proj": (("mlp", "down"),),
}


def _differing(model: ModelConfig, wanted: Mapping[str, str]) -> list[str]:
    return [
        f"model.{field}='{value}' (it is '{getattr(model, field)}')"
        for field, value in wanted.items()
        if getattr(model, field) != value
    ]


def _check_gpt2_heads(model: ModelConfig) -> None:
    if model.kv_heads != model.heads:
        raise UserError(f"{model.kv_heads=}: GPT-2 has as many key-value heads as query heads; {model.heads=}")
    if model.heads * model.head_size != model.width:
        raise UserError(f"{model.head_size=}: GPT-2's heads fill its width; {model.heads=}, {model.width=}")


def _flatten(params: build.Params) -> dict[ParamPath, Any]:
    flat: dict[ParamPath, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        flat[tuple(keys)] = leaf
    return flat


def _insert(params: build.Params, path: ParamPath, value: np.ndarray) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def _text(path: ParamPath) -> str:
    return "/".join(map(str, path))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
