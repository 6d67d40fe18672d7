"""The one schema of a run: frozen dataclasses inside, `ml_collections.ConfigDict` at the edge.

Config files call `default_config()`, change what differs and return the ConfigDict; `from_config_dict` turns it into
a validated `Config` exactly once. Every field is read somewhere in the package (`tests/test_config.py` walks the
schema). Code reads a field as `<section>.<field>`, for example `config.train.steps` or `train.steps`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder: everything that decides what the parameters mean."""

    vocab_size: int = 32768
    width: int = 768  # D
    mlp_width: int = 2048  # F
    layers: int = 12  # L
    heads: int = 6  # N, query heads
    kv_heads: int = 2  # K, key-value heads
    head_size: int = 128  # H
    context: int = 2048  # the longest sequence the model is trained and evaluated at
    rope_theta: float = 10_000.0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    positions: Literal["rope", "learned"] = "rope"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: Literal["none", "all"] = "none"
    embeddings: Literal["tied", "untied"] = "tied"
    dropout: float = 0.0
    window: int = 0  # sliding window in tokens; 0: the whole document


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed beyond rounding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products; parameters are float32
    # Products of float32 arrays in training and evaluation: exact, or of inputs rounded to bfloat16 with float32 sums
    # (mixed), twice as fast on CPUs made for it; auto is mixed there, exact elsewhere. Decoding is always exact.
    matmul: Literal["exact", "mixed", "auto"] = "exact"
    attention: Literal["auto", "xla", "cudnn", "pallas_tpu", "pallas_gpu"] = "auto"
    layers: Literal["scan", "unroll"] = "unroll"  # scan compiles faster, unroll runs faster
    remat: Literal["none", "dots", "full"] = "none"  # recomputed backward: nothing, elementwise, all


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1: all that are left."""

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch split, parameters and optimizer split
    context: int = 1  # rows split along their length, keys gathered for attention; parameters replicated
    tensor: int = 1  # heads and MLP width split


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`sentencepiece`: trained here unless `path` names a folder. `bytes`: raw UTF-8. `hf`: the folder `path`."""

    kind: Literal["sentencepiece", "bytes", "hf"] = "sentencepiece"
    path: str = ""
    train_bytes: int = 30_000_000  # how much of the training split sentencepiece is trained on


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they become rows of tokens.

    `sources`: comma-separated `SPEC[@WEIGHT][!nofim]`, SPEC one of `stdlib` (the running Python's library, without its
    tests), `installed`, `prose` (what the installed packages say of themselves), `dir:PATH`, `jsonl:PATH`,
    `parquet:PATH`, `tfds:NAME`, `hf:NAME[?config=..&split=..&column=..&streaming=1]`. Weights are per token.
    """

    sources: str = "hf:bigcode/the-stack-smol"
    dir: str = "data"  # prepared corpora, tokenizers and token shards; shared between runs
    workers: int = 0  # reader processes; 0: a thread of this process
    prefetch: int = 2  # batches kept ready on the device
    packing: Literal["concat", "best_fit", "document"] = "concat"  # document: a row is the beginning of one document
    min_tokens: int = 16  # packing=document: a document with fewer is unusable, and passed over
    max_unusable: int = 1000  # packing=document: so many unusable ones in a row end reading or training
    fim_rate: float = 0.5  # share of documents rearranged for fill-in-the-middle
    fim_spm_share: float = 0.5  # of those, the share with the suffix first (SPM); the rest prefix first (PSM)
    repository_order: bool = False  # one document per repository, files in dependency order
    validation_fraction: float = 0.05
    min_characters: int = 50  # shorter documents are dropped, after stripping
    max_documents: int = 0  # stop after this many kept documents per source; 0: all
    allow_dummy_data: bool = False  # generated text where a source cannot be read; marked, and verification fails it


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 10_000  # optimizer steps
    batch_size: int = 32  # rows per optimizer step, over all devices
    sequence_length: int = 2048  # tokens per row; at most model.context
    microbatch_size: int = 0  # gradient accumulation: rows worked through at a time; 0, or more than the batch: all
    z_loss: float = 0.0  # weight of logsumexp^2 (PaLM, arXiv 2204.02311)
    seed: int = 0
    log_every: int = 10

    @property
    def microbatch_rows(self) -> int:
        """Rows that one forward pass takes, over all devices."""
        return min(self.microbatch_size or self.batch_size, self.batch_size)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on everything, or Muon on the hidden matrices and AdamW on the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4  # peak, AdamW
    muon_learning_rate: float = 0.02  # peak, Muon matrices
    muon_momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled
    decay_pattern: str = r".*(kernel|embedding)$"  # parameters that decay, by path
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 500
    decay_steps: int = 0  # wsd: length of the last, linear part
    final_ratio: float = 0.1  # learning rate at the end, as a share of the peak


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is done about a loss or gradient that cannot be right, and how long a run waits for anything.

    An update from a non-finite loss or gradient is always skipped. A wait that takes too long ends the process, with
    the stacks of all threads and the exit code of a stalled run; 0 waits for ever.
    """

    max_skipped: int = 10  # updates skipped in a row after which the run stops
    spike_sigma: float = 0.0  # also skip losses so many standard deviations above their moving average; 0: none
    spike_window: int = 100  # updates of that moving average; before the first so many nothing is a spike
    step_seconds: float = 1800.0  # longest wait for the result of a step
    data_seconds: float = 1800.0  # longest wait for a batch
    save_seconds: float = 3600.0  # longest wait for a checkpoint
    stop_seconds: float = 300.0  # from SIGTERM to the end of the process


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Stages ppo and grpo: what is asked, how answers are drawn, what they are worth, and what is learned from them.

    One iteration is `questions` x `group_size` answers, gone through `inner_epochs` times in batches of
    `train.batch_size`.
    """

    prompts: Literal["conversations", "code"] = "conversations"  # turns that call functions; functions without a body
    prompt_count: int = 4000  # conversations, or calls of functions, that prompts are made of; a tenth is held out
    reward_model: str = ""  # run folder of the stage reward; "": answers are checked, where it takes that by running
    questions: int = 8  # of an iteration
    group_size: int = 8  # answers to each question; grpo compares these
    answer_tokens: int = 128  # the longest answer
    eval_answers: int = 1  # to each held-out prompt in an evaluation
    temperature: float = 0.8  # at which answers are drawn, and of the policy that is trained
    inner_epochs: int = 4
    clip: float = 0.2  # of the ratio of probabilities
    value_clip: float = 0.2  # ppo: of values
    value_weight: float = 0.5  # ppo: of the value loss
    entropy_weight: float = 0.01  # ppo: of the entropy bonus
    kl_coefficient: float = 0.02  # of the divergence from the start
    kl_target: float = 0.0  # nats per answer to which the coefficient is adapted; 0: it is fixed
    gamma: float = 0.99  # ppo: discount per token
    gae_lambda: float = 0.95  # ppo
    value_warmup: int = 0  # ppo: iterations at the start from which values alone are learned


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 500  # steps; also once at the end; 0: only at the end
    batches: int = 50  # validation batches per evaluation; 0: the whole split
    batch_size: int = 0  # rows; 0: as many as a training microbatch
    sample_prompts: tuple[str, ...] = ("def fibonacci(n):\n", "import os\n\n\nclass ")
    sample_tokens: int = 64  # 0: no samples
    sample_temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps; also once at the end
    keep: int = 3  # newest steps kept, beside the best


@dataclasses.dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True  # CLU summaries; needs the [tensorboard] extra
    histograms_every: int = 0  # steps between histograms of weights and gradients; 0: none
    charts_every: int = 500  # steps between PNG charts; also once at the end; 0: only at the end
    wandb: Literal["off", "offline", "online"] = "off"
    profile_steps: str = ""  # FIRST:STOP, a trace of steps FIRST to STOP - 1 in the run's folder profile/; "": none


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What a model is taught, and what it begins with. Every stage has a file in `stages/`."""

    name: Literal["pretrain", "sft", "distill", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    start: str = ""  # run or export whose parameters are the first, with a fresh optimizer; "": they are drawn

    @property
    def has_head(self) -> bool:
        """Whether a scalar head on the hidden states is trained: a reward."""
        return self.name == "reward"

    @property
    def has_critic(self) -> bool:
        """Whether a second decoder with a scalar head is trained beside the first: values."""
        return self.name == "ppo"


@dataclasses.dataclass(frozen=True)
class DialogConfig:
    """Conversations of stage sft: generated, calling functions that are really executed; or questions and answers."""

    source: str = ""  # "": generated; jsonl:PATH, parquet:PATH or hf:NAME: rows of questions and answers, or of talks
    count: int = 20_000  # conversations, a tenth of them held out; 0: all of the source
    seed: int = 0  # of those that are generated
    packed: bool = True  # several to a row, where they fit; False: one to a row


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What a student learns from a teacher, beside the text: alpha CE + (1 - alpha) T^2 KL(teacher || student)."""

    teacher: str = ""  # a run or an export with the same tokenizer
    alpha: float = 0.5
    temperature: float = 2.0
    top_k: int = 0  # likeliest tokens of the teacher, worked out once and kept; 0: it runs beside, over all tokens


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """Pairs of a better and a worse answer, for the stages `reward` and `dpo`.

    `sources`: some of `code` (functions of the Python documents of `data.sources`), `conversations` (generated ones
    that call functions) and `jsonl:PATH` (prompt, chosen, rejected; a string each, or messages).
    """

    sources: str = "code,conversations"
    count: int = 4000  # most training pairs of `code` and of `conversations`; held out is a tenth of that
    seed: int = 0  # of the pairs; their order in training is that of train.seed


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    beta: float = 0.1  # how much an answer's log-probability, less that at the start, is worth (arXiv 2305.18290)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in the stages sft, dpo and grpo: they alone are trained, beside the model of
    `stage.start`, which stays as it is.
    """

    rank: int = 0  # 0: none; all parameters are trained
    alpha: float = 16.0  # what adapters add to a kernel is alpha / rank times their product
    pattern: str = r"(attention|mlp)/.*kernel"  # kernels that get adapters, by their path in a block


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "unnamed"  # the variant, as reports call it
    stage: StageConfig = StageConfig()
    dialogs: DialogConfig = DialogConfig()
    distill: DistillConfig = DistillConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DpoConfig = DpoConfig()
    lora: LoraConfig = LoraConfig()
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def eval_rows(config: Config) -> int:
    """Rows of an evaluation batch, over all devices."""
    return config.eval.batch_size or config.train.microbatch_rows


def evaluated_on(config: Config) -> str:
    """What an evaluation during training covers, in words."""
    rows = config.eval.batches * eval_rows(config)
    return f"the first {rows} rows of the held-out files, or all if fewer" if rows else "all held-out files"


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, as written to `config.json`."""
    return dataclasses.asdict(config)


def default_config() -> Any:
    """A mutable ConfigDict of every default: what a config file starts from.

    Typed Any, because a type checker cannot follow the attributes of a ConfigDict.
    """
    return ConfigDict(to_dict(Config()))


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates the frozen config. Raises UserError on an unknown key, a wrong type or a contradiction."""
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    if not isinstance(plain, Mapping):
        raise UserError(f"a config is sections of keys and values; got {type(plain).__name__}")
    config = _build(Config, plain, "")
    validate(config)
    return config


def parameter_count(model: ModelConfig) -> int:
    """The number of parameters of a shape, by arithmetic; a test holds it against the model itself."""
    d, f = model.width, model.mlp_width
    q_width, kv_width = model.heads * model.head_size, model.kv_heads * model.head_size
    attention = 2 * d * q_width + 2 * d * kv_width
    mlp = (3 if model.mlp == "swiglu" else 2) * d * f
    norm = d if model.norm == "rmsnorm" else 2 * d
    biases = 0
    if model.bias == "all":
        biases = q_width + 2 * kv_width + d + (2 * f if model.mlp == "swiglu" else f) + d
    tables = model.vocab_size * d * (1 if model.embeddings == "tied" else 2)
    tables += model.context * d if model.positions == "learned" else 0
    return tables + model.layers * (attention + mlp + 2 * norm + biases) + norm


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' for the known name closest to `name`, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(known))


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}{key}'; {nearest(key, list(hints))}")
    built = {}
    for key, value in values.items():
        hint, path = hints[key], prefix + key
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"config key '{path}' is a section; got {value!r}")
            built[key] = _build(hint, value, path + ".")
        else:
            built[key] = _coerce(hint, value, path)
    return cls(**built)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{path}={value!r}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{path}={value!r}: expected a sequence of strings")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def validate(config: Config) -> None:
    """Refuses contradictions that types cannot see. Raises UserError naming the fields and the way out."""
    model, train, optimizer, data = config.model, config.train, config.optimizer, config.data
    sizes = ("vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_size", "context")
    checks = [
        *((getattr(model, name) >= 1, f"model.{name}={getattr(model, name)} must be at least 1") for name in sizes),
        # All are computed before the first is looked at.
        (
            model.kv_heads >= 1 and model.heads % model.kv_heads == 0,
            f"{model.heads=} must be a multiple of {model.kv_heads=}",
        ),
        (model.head_size % 2 == 0, f"{model.head_size=} must be even: rotary positions turn pairs"),
        (0.0 <= model.dropout < 1.0, f"{model.dropout=} must be in [0, 1)"),
        (model.window >= 0, f"{model.window=} must not be negative; 0 is the whole document"),
        (
            1 <= train.sequence_length <= model.context,
            f"{train.sequence_length=} must be between 1 and {model.context=}; lower the first or raise the second",
        ),
        (train.steps >= 0, f"{train.steps=} must not be negative"),
        (
            train.batch_size >= 1 and train.microbatch_size >= 0 and train.batch_size % train.microbatch_rows == 0,
            f"{train.batch_size=} must be a positive multiple of {train.microbatch_size=}",
        ),
        (0 <= train.seed < 2**32, f"{train.seed=} must be between 0 and {2**32 - 1}"),
        (train.log_every >= 1, f"{train.log_every=} must be at least 1"),
        (0.0 <= data.fim_rate <= 1.0, f"{data.fim_rate=} must be in [0, 1]"),
        (0.0 <= data.fim_spm_share <= 1.0, f"{data.fim_spm_share=} must be in [0, 1]"),
        (0.0 < data.validation_fraction < 1.0, f"{data.validation_fraction=} must be between 0 and 1"),
        (data.workers >= 0, f"{data.workers=} must not be negative"),
        (data.prefetch >= 1, f"{data.prefetch=} must be at least 1"),
        (data.max_documents >= 0, f"{data.max_documents=} must not be negative; 0 is all"),
        (data.min_tokens >= 1, f"{data.min_tokens=} must be at least 1"),
        (data.max_unusable >= 1, f"{data.max_unusable=} must be at least 1"),
        (config.guard.max_skipped >= 1, f"{config.guard.max_skipped=} must be at least 1"),
        (config.guard.spike_window >= 2, f"{config.guard.spike_window=} must be at least 2"),
        *(
            (
                math.isfinite(getattr(config.guard, name)) and getattr(config.guard, name) >= 0,
                f"guard.{name}={getattr(config.guard, name)} must be 0 (off) or a positive number",
            )
            for name in ("spike_sigma", "step_seconds", "data_seconds", "save_seconds", "stop_seconds")
        ),
        (
            config.compute.matmul != "mixed" or config.compute.dtype == "float32",
            f"{config.compute.matmul=} is of float32 products, and with {config.compute.dtype=} there are none; set "
            "compute.dtype to float32, or leave compute.matmul at auto",
        ),
        *_teaching_checks(config),
        *_rl_checks(config),
        *_lora_checks(config),
        (config.checkpoint.every >= 1, f"{config.checkpoint.every=} must be at least 1"),
        (config.checkpoint.keep >= 1, f"{config.checkpoint.keep=} must be at least 1"),
        (config.eval.every >= 0, f"{config.eval.every=} must not be negative; 0 is only at the end"),
        (config.eval.batches >= 0, f"{config.eval.batches=} must not be negative; 0 is the whole split"),
        (config.eval.batch_size >= 0, f"{config.eval.batch_size=} must not be negative"),
        (
            config.eval.sample_tokens >= 0
            and (config.eval.sample_tokens < model.context or not config.eval.sample_prompts),
            f"{config.eval.sample_tokens=} must be below {model.context=}, for the prompt stands in front; 0 is none",
        ),
        (
            math.isfinite(config.eval.sample_temperature) and config.eval.sample_temperature >= 0,
            f"{config.eval.sample_temperature=} must be 0 (greedy) or a positive number",
        ),
        (optimizer.warmup_steps >= 0, f"{optimizer.warmup_steps=} must not be negative"),
        (
            optimizer.schedule != "wsd" or 0 < optimizer.decay_steps <= train.steps,
            f"{optimizer.decay_steps=} must be between 1 and {train.steps=} for the wsd schedule",
        ),
        (
            config.tokenizer.kind != "hf" or config.tokenizer.path != "",
            "tokenizer.kind='hf' needs tokenizer.path: the folder of a published tokenizer",
        ),
        (
            config.tokenizer.kind != "bytes" or model.vocab_size == 256,
            f"tokenizer.kind='bytes' has 256 entries, but {model.vocab_size=}",
        ),
    ]
    first_step = (profiled_steps(config.log.profile_steps) or (0, 0))[0]
    checks.append((first_step <= train.steps, f"{config.log.profile_steps=} begins after {train.steps=}"))
    for holds, message in checks:
        if not holds:
            raise UserError(f"config: {message}")


def profiled_steps(text: str) -> tuple[int, int] | None:
    """First and stop of `log.profile_steps`; None for none. Raises UserError where it is not FIRST:STOP."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise UserError(
            f"log.profile_steps={text!r}: expected FIRST:STOP with 1 <= FIRST < STOP, such as 20:23 for the steps 20, "
            "21 and 22"
        )
    return int(found[1]), int(found[2])


def _teaching_checks(config: Config) -> list[tuple[bool, str]]:
    return [
        (
            config.dialogs.count >= (0 if config.dialogs.source else 1),
            f"{config.dialogs.count=} must be at least 1, or 0 for all of dialogs.source",
        ),
        (0.0 <= config.distill.alpha <= 1.0, f"{config.distill.alpha=} must be in [0, 1]"),
        (0 < config.distill.temperature < math.inf, f"{config.distill.temperature=} must be a positive number"),
        (
            0 <= config.distill.top_k <= config.model.vocab_size,
            f"{config.distill.top_k=} must be between 0 and {config.model.vocab_size=}; 0 is the whole vocabulary",
        ),
        (config.preferences.count >= 1, f"{config.preferences.count=} must be at least 1"),
        (0 < config.dpo.beta < math.inf, f"{config.dpo.beta=} must be a positive number"),
    ]


def _rl_checks(config: Config) -> list[tuple[bool, str]]:
    rl, train = config.rl, config.train
    counts = ("prompt_count", "questions", "group_size", "answer_tokens", "eval_answers", "inner_epochs")
    positive = ("temperature", "clip", "value_clip")
    weights = ("value_weight", "entropy_weight", "kl_coefficient", "kl_target", "value_warmup")
    shares = ("gamma", "gae_lambda")
    return [
        *((getattr(rl, name) >= 1, f"rl.{name}={getattr(rl, name)} must be at least 1") for name in counts),
        *(
            (0 < getattr(rl, name) < math.inf, f"rl.{name}={getattr(rl, name)} must be a positive number")
            for name in positive
        ),
        *(
            (0 <= getattr(rl, name) < math.inf, f"rl.{name}={getattr(rl, name)} must be 0 or a positive number")
            for name in weights
        ),
        *((0 <= getattr(rl, name) <= 1, f"rl.{name}={getattr(rl, name)} must be in [0, 1]") for name in shares),
        (
            config.stage.name not in ("ppo", "grpo") or rl.questions * rl.group_size % max(train.batch_size, 1) == 0,
            f"rl.questions x rl.group_size = {rl.questions * rl.group_size} answers must be a multiple of "
            f"{train.batch_size=}",
        ),
        (
            config.stage.name not in ("ppo", "grpo") or rl.answer_tokens < train.sequence_length,
            f"{rl.answer_tokens=} must be below {train.sequence_length=}, for the prompt stands in front",
        ),
        (
            config.stage.name != "grpo" or rl.group_size >= 2,
            f"{rl.group_size=} must be at least 2 for the stage grpo, which compares the answers to one question",
        ),
    ]


def _lora_checks(config: Config) -> list[tuple[bool, str]]:
    lora, stage = config.lora, config.stage.name
    return [
        (lora.rank >= 0, f"{lora.rank=} must not be negative; 0 trains all parameters"),
        (0 < lora.alpha < math.inf, f"{lora.alpha=} must be a positive number"),
        (
            lora.rank == 0 or stage in ("sft", "dpo", "grpo"),
            f"{lora.rank=}, but stage.name={stage!r} trains all parameters: adapters are for sft, dpo and grpo; set it "
            "to 0",
        ),
        (
            lora.rank == 0 or config.optimizer.name == "adamw",
            f"{lora.rank=} needs optimizer.name='adamw': Muon is for whole kernels",
        ),
    ]
