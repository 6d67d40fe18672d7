"""The PyTorch side of `tools.bench.step`: a training step of the same shape in other libraries.

`torch`: transformers; for a byte-level model, the code of its export. `litgpt`: the model and loss of litgpt's
pretraining.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, DecoderConfig, HnetConfig, OptimizerConfig
from tools.bench import hnet_torch
from tools.bench.step_timing import cores, random_batches, resident_set, timed

LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "dropout": 0.0, "window": 0}
CAUSAL = "causal"  # attention that ignores the borders of documents
Loss = Callable[[Any, dict[str, Any]], Any]  # (model, microbatch) -> loss


def check_shape(config: Config, name: str, attention: str) -> None:
    """Raises UserError for a model that contender `name` does not have: these libraries' trainers have Llama, and
    `torch` has byte-level models whose rows are one document each."""
    if isinstance(config.model, HnetConfig) and name == "torch":
        if attention != CAUSAL:
            raise UserError(f"--their-attention={attention}: for a byte-level model, theirs runs with {CAUSAL}")
    else:
        check_llama(config, name)


def check_llama(config: Config, name: str) -> None:
    """Raises UserError for a model that is not a Llama."""
    model = decoder_of(config)
    differing = [
        f"model.{name}={getattr(model, name)!r} instead of {wanted!r}"
        for name, wanted in LLAMA.items()
        if getattr(model, name) != wanted
    ]
    if differing:
        raise UserError(f"--against={name} compares with Llama, which this config is not: {', '.join(differing)}")


def measure_torch(
    name: str, config: Config, steps: int, documents: int | None, *, attention: str, compile: bool, autocast: bool
) -> dict[str, Any]:
    """Measures steps of contender `name`, in bfloat16 if the config or `autocast` says so. Raises UserError if it is
    not installed.
    """
    torch, model, loss_of = BUILDERS[name](config, attention)
    torch.set_num_threads(cores())
    train, settings = config.train, config.optimizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    if count != config.model.parameter_count():
        raise UserError(f"{name}'s model has {count:,} parameters, ours {config.model.parameter_count():,}")
    optimizer = adamw(torch, parameters, settings, settings.learning_rate)
    forward = torch.compile(model) if compile else model
    batches = [
        {key: torch.from_numpy(batch[key].astype(np.int64)).to(device) for key in ("tokens", "targets", "positions")}
        for batch in random_batches(config, documents)
    ]
    rows, half = train.microbatch_rows, autocast or config.compute.dtype == "bfloat16"

    def run(number: int) -> float:
        total = 0.0
        for start in range(0, train.batch_size, rows):
            part = {key: value[start : start + rows] for key, value in batches[number % len(batches)].items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = loss_of(forward, part) / (train.batch_size // rows)
            loss.backward()
            total += loss.detach()
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)  # waits for the device, including the optimizer's work

    step_seconds, loss = timed(run, steps)
    accelerator = device.type == "cuda"
    return {
        "software": ", ".join(
            [
                *VERSIONS[name](),
                f"torch {torch.__version__}",
                *(["compiled"] if compile else []),
                *(["autocast"] if autocast else []),
            ]
        ),
        "device": torch.cuda.get_device_name() if accelerator else "cpu",
        "devices": 1,
        "accelerator": accelerator,
        "step_seconds": step_seconds,
        "loss": loss,
        "memory": torch.cuda.max_memory_allocated() if accelerator else resident_set(),
    }


def adamw(torch: Any, parameters: Iterable[Any], settings: OptimizerConfig, learning_rate: float) -> Any:
    """Fused AdamW, without weight decay for vectors."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        fused=True,
    )


def build_plain(config: Config, attention: str) -> tuple[Any, Any, Loss]:
    """Contender `torch`."""
    if isinstance(config.model, HnetConfig):
        modules("torch", "smallcoder_jax[parity]", "torch", "transformers")
        return hnet_torch.build_trainer(config)
    return build_transformers(config, attention)


def build_transformers(config: Config, attention: str) -> tuple[Any, Any, Loss]:
    torch, transformers = modules("torch", "smallcoder_jax[parity]", "torch", "transformers")
    if attention == CAUSAL:
        # Without a mask function, transformers passes no mask, and sdpa uses its causal kernel. With "sdpa" itself, a
        # compiled model makes a dense mask, because it cannot know that each row is one document.
        sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
        transformers.AttentionInterface.register(CAUSAL, sdpa)
    torch.manual_seed(config.train.seed)
    model = transformers.LlamaForCausalLM(llama_config(config, transformers, attention))

    def loss(model: Any, part: dict[str, Any]) -> Any:
        positions = {} if attention == CAUSAL else {"position_ids": part["positions"]}
        return model(input_ids=part["tokens"], labels=part["tokens"], **positions).loss

    return torch, model, loss


def build_litgpt(config: Config, attention: str) -> tuple[Any, Any, Loss]:
    torch, litgpt, utils = modules("litgpt", "litgpt", "torch", "litgpt", "litgpt.utils")
    if attention != CAUSAL:
        raise UserError(f"litgpt does not keep documents apart; it runs with --their-attention={CAUSAL}")
    model = decoder_of(config)
    torch.manual_seed(config.train.seed)
    built = litgpt.GPT(
        litgpt.Config(
            block_size=model.context,
            vocab_size=model.vocab_size,
            padded_vocab_size=model.vocab_size,
            n_layer=model.layers,
            n_embd=model.width,
            n_head=model.heads,
            n_query_groups=model.kv_heads,
            head_size=model.head_size,
            intermediate_size=model.mlp_width,
            rope_base=int(model.rope_theta),
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=model.bias == "all",
            norm_class_name="RMSNorm",
            norm_eps=model.norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    )
    built.apply(built._init_weights)
    if model.embeddings == "tied":
        built.transformer.wte.weight = built.lm_head.weight

    def loss(model: Any, part: dict[str, Any]) -> Any:
        return utils.chunked_cross_entropy(model(part["tokens"]), part["targets"], chunk_size=0)

    return torch, built, loss


def decoder_of(config: Config) -> DecoderConfig:
    """The config of the model. Raises UserError for a family that the contenders do not have."""
    if not isinstance(config.model, DecoderConfig):
        raise UserError(f"{config.model.family=}: this contender has only decoders")
    return config.model


def llama_config(config: Config, transformers: Any, attention: str) -> Any:
    """The transformers configuration of the same shape."""
    model = decoder_of(config)
    return transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.context,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.embeddings == "tied",
        attention_bias=model.bias == "all",
        mlp_bias=model.bias == "all",
        attn_implementation=attention,
        use_cache=False,
    )


def modules(contender: str, package: str, *names: str) -> list[Any]:
    """The modules of a contender. Raises UserError, which gives the command that installs them, if one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(
            f"--against={contender} needs {error.name}; run: {sys.executable} -m pip install '{package}'"
        ) from error


def versions(*packages: str) -> Callable[[], list[str]]:
    return lambda: [f"{package} {importlib.metadata.version(package)}" for package in packages]


BUILDERS: dict[str, Callable[[Config, str], tuple[Any, Any, Loss]]] = {
    "torch": build_plain,
    "litgpt": build_litgpt,
}
VERSIONS = {
    "torch": versions("transformers"),
    "litgpt": versions("litgpt"),
}
