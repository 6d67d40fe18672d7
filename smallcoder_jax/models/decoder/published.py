"""The published formats of decoders: Llama and GPT-2 in transformers. One map of names each serves for reading and
writing.

Kernels of GPT-2's Conv1D are [in, out], like ours. GPT-2 keeps query, key and value in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DecoderConfig
from smallcoder_jax.models.published import ParamPath, Published, Settings, Tensor, shown


def model_type(model: DecoderConfig) -> str:
    """`llama` or `gpt2`: the published architecture that computes what `model` computes.

    Raises UserError that names the fields that neither can express. Dropout is ignored: it acts only in training.
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


def tensors(model: DecoderConfig) -> list[Tensor]:
    return _TENSORS[model_type(model)](model)


def shapes(model: DecoderConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter of `model` in the unrolled layout.

    It is computed from the config without building the model, which may be too large for any machine. A test compares
    it with the model itself.
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
        size = sizes.get(str(layer), (d, d))  # a norm has no kernel
        return size if kind in ("kernel", "embedding") else size[1:]

    return {path: shape(path) for tensor in tensors(model) for path in tensor.ours}


def stored(model: DecoderConfig, where: Path, held: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Maps the published name of each tensor to its name in the weights in `where`.

    A model that was saved without its head, such as OpenAI's own GPT-2, has names without the prefix of the body. Old
    files also hold tensors that are not parameters but follow from the settings: the causal mask and the frequencies of
    the rotary embedding. Of a head and the embedding that it is tied to, a file may hold either one or both.

    Raises UserError, before anything is built, when config.json says more layers than `held` has tensors.
    """
    if model.layers > len(held):
        raise UserError(f"config.json says {model.layers:,} layers, but {where} holds {len(held):,} tensors in all")
    names = {tensor.name for tensor in tensors(model)}
    prefix, computed = _BODIES[model_type(model)]
    kept, lacking = [name for name in held if not computed.search(name)], names - held.keys()
    found = {(prefix + name if prefix + name in lacking else name): name for name in kept}
    if both := tied(model):
        head, table = both
        if table not in found and head in found:
            found[table] = found.pop(head)
    return found


def tied(model: DecoderConfig) -> tuple[str, str] | None:
    """The names of the head and of the embedding that it is tied to; None when they are not tied."""
    return (_HEAD, tensors(model)[0].name) if model.embeddings == "tied" else None


def settings(model: DecoderConfig) -> dict[str, Any]:
    shared = {"vocab_size": model.vocab_size, "tie_word_embeddings": model.embeddings == "tied"}
    if model_type(model) == "llama":
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": model.width,
            "intermediate_size": model.mlp_width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_size,
            "max_position_embeddings": model.context,
            # transformers 5 reads the first entry, older versions the second.
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "rope_theta": model.rope_theta,
            "rms_norm_eps": model.norm_eps,
            "hidden_act": "silu",
            "attention_bias": model.bias == "all",
            "mlp_bias": model.bias == "all",
            "attention_dropout": 0.0,
        }
    return shared | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.width,
        "n_inner": model.mlp_width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.context,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": "gelu_new",
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def describe(model: DecoderConfig) -> tuple[str, dict[str, str]]:
    kind = {"llama": "A decoder in the style of Llama", "gpt2": "A decoder in the style of GPT-2"}[model_type(model)]
    rotary = f"rotary, theta {model.rope_theta}"
    return kind, {
        "layers": f"{model.layers}",
        "width": f"{model.width}",
        "MLP": f"{model.mlp_width}, {model.mlp}",
        "heads": f"{model.heads} query, {model.kv_heads} key-value, of {model.head_size}",
        "positions": rotary if model.positions == "rope" else "learned",
        "norm": f"{model.norm}, epsilon {model.norm_eps}",
        "vocabulary": f"{model.vocab_size:,}, embeddings {model.embeddings}",
    }


def _llama(model: DecoderConfig) -> list[Tensor]:
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


def _gpt2(model: DecoderConfig) -> list[Tensor]:
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


def _head(model: DecoderConfig) -> list[Tensor]:
    untied = model.embeddings == "untied"
    return [Tensor(_HEAD, (("unembed", "kernel"),), transposed=True)] if untied else []


_TENSORS: dict[str, Callable[[DecoderConfig], list[Tensor]]] = {"llama": _llama, "gpt2": _gpt2}

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
# By model_type: the prefix of all names but the head's, and the tensors of files that are computed, not learned.
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


def _differing(model: DecoderConfig, wanted: Mapping[str, str]) -> list[str]:
    return [
        f"model.{field}='{value}' (it is '{getattr(model, field)}')"
        for field, value in wanted.items()
        if getattr(model, field) != value
    ]


def _check_gpt2_heads(model: DecoderConfig) -> None:
    if model.kv_heads != model.heads:
        raise UserError(f"{model.kv_heads=}: GPT-2 has as many key-value heads as query heads; {model.heads=}")
    if model.heads * model.head_size != model.width:
        raise UserError(f"{model.head_size=}: GPT-2's heads fill its width; {model.heads=}, {model.width=}")


def _read_llama(settings: Settings) -> DecoderConfig:
    width, heads = settings.get("hidden_size", int), settings.get("num_attention_heads", int)
    settings.insist("hidden_act", "silu", "silu")
    biased = settings.get("attention_bias", bool, False)
    if settings.get("mlp_bias", bool, False) != biased:
        raise UserError(f"{settings.path}: attention_bias is {biased} and mlp_bias is not; supported: both or neither")
    return DecoderConfig(
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


def _rope_theta(settings: Settings) -> float:
    """The base of the rotary embedding, given in `rope_parameters`, or as `rope_theta` with `rope_scaling`."""
    thetas = []
    for key in ("rope_parameters", "rope_scaling"):
        rotation = settings.get(key, dict, {})
        kind = rotation.get("rope_type", rotation.get("type", "default"))
        others = sorted(rotation.keys() - {"rope_type", "type", "rope_theta"})
        if kind != "default" or others:
            raise UserError(
                f"{settings.path}: {key} is {shown(rotation)}; supported: rope_type 'default' with a "
                "rope_theta. Positions that are scaled or partly rotated are not computed by this decoder"
            )
        thetas.append(Settings(settings.path, rotation).get("rope_theta", float, 0.0))
    thetas.append(settings.get("rope_theta", float, 0.0))
    given = sorted({theta for theta in thetas if theta})
    if len(given) > 1:
        raise UserError(f"{settings.path} gives two values of rope_theta, {given[0]} and {given[1]}; leave one")
    return given[0] if given else 10_000.0


def _read_gpt2(settings: Settings) -> DecoderConfig:
    width, heads = settings.get("n_embd", int), settings.get("n_head", int)
    settings.insist("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    settings.insist("scale_attn_weights", True, True)
    settings.insist("scale_attn_by_inverse_layer_idx", False, False)
    settings.insist("add_cross_attention", False, False)
    return DecoderConfig(
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


_READERS: dict[str, Callable[[Settings], DecoderConfig]] = {"llama": _read_llama, "gpt2": _read_gpt2}


PUBLISHED = Published(
    model_type=model_type,
    readers=_READERS,
    settings=settings,
    tensors=tensors,
    shapes=shapes,
    stored=stored,
    tied=tied,
    describe=describe,
)
