"""The one name map per published family, used in both directions.

A `Tensor` says which tensor of the published file holds which of our parameters. Ours are [in, out]; torch's Linear is
[out, in], GPT-2's Conv1D is [in, out] and keeps query, key and value in one tensor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig
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


def from_published(
    model: ModelConfig, where: Path, held: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> build.Params:
    """Named tensors to unrolled parameters.

    `held` are the shapes of all tensors that the weights in `where` hold, by name; `read` gives the values of one. What
    config.json says is compared with `held` before anything is built or read. Raises UserError that names tensors which
    are missing, unknown, of another shape, or a head that is not the table it is tied to.
    """
    if model.layers > len(held):
        raise UserError(f"config.json says {model.layers:,} layers, but {where} holds {len(held):,} tensors in all")
    wanted, expected = tensors(model), expected_shapes(model)
    names, table = {tensor.name for tensor in wanted}, wanted[0].name
    stored = _stored_names(model, names, table, held)
    if missing := sorted(names - stored.keys()):
        raise UserError(f"{where} lacks {_some(missing)}, which its config.json says it holds")
    if unknown := sorted(stored.keys() - names - {_HEAD}):
        raise UserError(f"{where} holds {_some(unknown)}, which no {family(model)} of its config.json has")
    for tensor in wanted:
        shape = _published_shape(tensor, expected)
        if held[stored[tensor.name]] != shape:
            raise UserError(f"{where}: tensor {tensor.name} has shape {held[stored[tensor.name]]}; expected {shape}")
    if _HEAD in stored.keys() - names:
        _check_tied(where, held, read, stored[_HEAD], stored[table])
    params: build.Params = {}
    for tensor in wanted:
        value = read(stored[tensor.name])
        value = value.T if tensor.transposed else value
        borders = np.cumsum([expected[path][-1] for path in tensor.ours])[:-1]
        for path, part in zip(tensor.ours, np.split(value, borders, axis=-1), strict=True):
            _insert(params, path, np.ascontiguousarray(part))
    return params


def expected_shapes(model: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of `model` in the unrolled layout, by arithmetic: it may be a size that no machine
    could build. A test holds it against the model itself.
    """
    d, q_width, kv_width = model.width, model.heads * model.head_size, model.kv_heads * model.head_size
    sizes = {
        "embed": (model.vocab_size, d),
        "position_embed": (model.context, d),
        "unembed": (d, model.vocab_size),
        "query": (d, q_width),
        "key": (d, kv_width),
        "value": (d, kv_width),
        "output": (q_width, d),
        "gate": (d, model.mlp_width),
        "up": (d, model.mlp_width),
        "down": (model.mlp_width, d),
    }

    def shape(path: ParamPath) -> tuple[int, ...]:
        layer, kind = path[-2:]
        size = sizes.get(str(layer), (d, d))  # else a norm, which has no kernel
        return size if kind in ("kernel", "embedding") else size[1:]

    return {path: shape(path) for tensor in tensors(model) for path in tensor.ours}


def _stored_names(model: ModelConfig, names: Set[str], table: str, held: Mapping[str, Any]) -> dict[str, str]:
    """The name among `names` of every parameter of the weights, to the name that they have for it; `table` is that of
    the embedding.

    A model that was saved without its head has names without the prefix of the body (OpenAI's own GPT-2). Old files
    also hold what is no parameter and follows from the settings: the causal mask, the frequencies of the rotation. Of a
    head that is tied to the table, some writers keep the one, some the other, some both.
    """
    prefix, computed = _BODIES[family(model)]
    kept, lacking = [name for name in held if not computed.search(name)], names - held.keys()
    stored = {(prefix + name if prefix + name in lacking else name): name for name in kept}
    if model.embeddings == "tied" and table not in stored and _HEAD in stored:
        stored[table] = stored.pop(_HEAD)
    return stored


def _check_tied(
    where: Path, held: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], head: str, table: str
) -> None:
    """A head beside the table that it is tied to says nothing new, or config.json is wrong."""
    if held[head] != held[table] or not np.array_equal(read(head), read(table), equal_nan=True):
        raise UserError(
            f"{where}: {head} differs from {table}, but its config.json says that the two are tied; set "
            "tie_word_embeddings to false there if the model has a head of its own"
        )


def _published_shape(tensor: Tensor, shapes: Mapping[ParamPath, tuple[int, ...]]) -> tuple[int, ...]:
    parts = [shapes[path] for path in tensor.ours]
    joined = (*parts[0][:-1], sum(part[-1] for part in parts))
    return joined[::-1] if tensor.transposed else joined


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
    return [Tensor(_HEAD, (("unembed", "kernel"),), transposed=True)] if untied else []


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

_HEAD = "lm_head.weight"
# By family: what the names of all but the head begin with, and tensors of files that are computed and not learnt.
_BODIES = {
    "llama": ("model.", re.compile(r"\.rotary_emb\.inv_freq$")),
    "gpt2": ("transformer.", re.compile(r"\.attn\.(masked_)?bias$")),
}

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
