"""The schema of a run's config: config files use `ml_collections.ConfigDict`, the package uses frozen dataclasses.

A config file calls `default_config()`, changes some values and returns the ConfigDict; `from_config_dict` turns it into
a validated `Config` exactly once. Every field is read somewhere in the package (`tests/test_config.py` checks every
field). Code reads a field as `<section>.<field>`, for example `config.train.steps` or `train.steps`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config.data import DataConfig, DialogConfig, PreferencesConfig, TokenizerConfig
from smallcoder_jax.config.fields import Section, out_of_range, shown
from smallcoder_jax.config.model import ComputeConfig, DecoderConfig, MeshConfig, ModelConfig, model_section
from smallcoder_jax.config.stages import KINDS, DistillConfig, DpoConfig, LoraConfig, RLConfig, StageConfig
from smallcoder_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    profiled_steps,
)


@dataclasses.dataclass(frozen=True)
class Config(Section):
    name: str = "unnamed"  # the name of the variant in reports
    stage: StageConfig = dataclasses.field(default_factory=StageConfig)
    dialogs: DialogConfig = dataclasses.field(default_factory=DialogConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    preferences: PreferencesConfig = dataclasses.field(default_factory=PreferencesConfig)
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    model: ModelConfig = dataclasses.field(default_factory=DecoderConfig)  # the section of the model's family
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def problems(self) -> Iterator[str]:
        """Contradictions between fields of different sections."""
        model, train, evaluation, kind = self.model, self.train, self.eval, self.stage.kind
        if train.sequence_length > model.context:
            yield (
                f"train.sequence_length={train.sequence_length} must be at most model.context={model.context}; lower "
                "the first or raise the second"
            )
        if evaluation.sample_prompts and evaluation.sample_tokens >= model.context:
            yield (
                f"eval.sample_tokens={evaluation.sample_tokens} must be below model.context={model.context}, for the "
                "prompt comes first; 0 means no samples"
            )
        if self.optimizer.schedule == "wsd" and not 0 < self.optimizer.decay_steps <= train.steps:
            yield (
                f"optimizer.decay_steps={self.optimizer.decay_steps} must be between 1 and train.steps={train.steps} "
                "for the wsd schedule"
            )
        if evaluation.split == "test" and (self.data.test_fraction == 0 or kind.reads != "documents"):
            yield (
                "eval.split='test' is for a stage that reads documents and set some apart: data.test_fraction="
                f"{self.data.test_fraction}, stage.name={self.stage.name!r}"
            )
        if self.tokenizer.entries not in (None, model.vocab_size):
            yield (
                f"tokenizer.kind={self.tokenizer.kind!r} has {self.tokenizer.entries} entries, but "
                f"model.vocab_size={model.vocab_size}"
            )
        if self.distill.top_k > model.vocab_size:
            yield (
                f"distill.top_k={self.distill.top_k} must be at most model.vocab_size={model.vocab_size}; 0 means the "
                "whole vocabulary"
            )
        if (profiled_steps(self.log.profile_steps) or (0, 0))[0] > train.steps:
            yield f"log.profile_steps={self.log.profile_steps!r} begins after train.steps={train.steps}"
        if self.lora.rank and not kind.adapters:
            *others, last = [name for name, other in KINDS.items() if other.adapters]
            yield (
                f"lora.rank={self.lora.rank}, but stage.name={self.stage.name!r} trains all parameters: adapters are "
                f"for {', '.join(others)} and {last}; set it to 0"
            )
        if self.lora.rank and self.optimizer.name != "adamw":
            yield f"lora.rank={self.lora.rank} needs optimizer.name='adamw': Muon is for whole kernels"
        if kind.reads == "prompts":
            yield from self._answer_problems()

    def _answer_problems(self) -> Iterator[str]:
        rl, train = self.rl, self.train
        answers = rl.questions * rl.group_size
        if answers % train.batch_size:
            yield (
                f"rl.questions x rl.group_size = {answers} answers must be a multiple of train.batch_size="
                f"{train.batch_size}"
            )
        if rl.answer_tokens >= train.sequence_length:
            yield (
                f"rl.answer_tokens={rl.answer_tokens} must be below train.sequence_length={train.sequence_length}, "
                "for the prompt comes first"
            )
        if self.stage.kind.compares and rl.group_size < 2:
            yield (
                f"rl.group_size={rl.group_size} must be at least 2 for the stage {self.stage.name}, which compares the "
                "answers to one question"
            )


def eval_rows(config: Config) -> int:
    """The number of rows of an evaluation batch, over all devices."""
    return config.eval.batch_size or config.train.microbatch_rows


def evaluated_on(config: Config) -> str:
    """A description of the data that an evaluation during training covers."""
    rows = config.eval.batches * eval_rows(config)
    return f"the first {rows} rows of the held-out files, or all if fewer" if rows else "all held-out files"


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, as written to `config.json`."""
    return dataclasses.asdict(config)


def default_config(family: str = DecoderConfig.family) -> Any:
    """A mutable ConfigDict of all default values for a family of models, from which a config file starts.

    The return type is Any, because a type checker cannot follow the attributes of a ConfigDict.
    """
    return ConfigDict(to_dict(Config(model=model_section(family)())))


def from_config_dict(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates the frozen config. Raises UserError for an unknown key, a wrong type, a number out of its
    range or a contradiction.
    """
    config = build(values)
    validate(config)
    return config


def build(values: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds the config without `validate`: numbers may be out of their range, and values may contradict each other.
    Raises UserError for an unknown key or a wrong type.
    """
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    if not isinstance(plain, Mapping):
        raise UserError(f"a config is sections of keys and values; got {type(plain).__name__}")
    return _build(Config, plain, "")


def nearest(name: str, known: list[str]) -> str:
    """A hint for the unknown `name`: 'did you mean X?' with the known names that end in the same word, or else with the
    closest known name. Where none is close, it lists all known names.
    """
    same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "known: " + ", ".join(sorted(known))


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}{key}'; {nearest(str(key), list(hints))}")
    built = {}
    for key, value in values.items():
        hint, path = hints[key], prefix + key
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise UserError(f"config key '{path}' is a section; got {shown(value)}")
            if hint is ModelConfig:  # the configs of older runs have no family; those models are decoders
                hint = model_section(value.get("family", DecoderConfig.family))
            built[key] = _build(hint, value, path + ".")
        else:
            built[key] = _coerce(hint, value, path)
    return cls(**built)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is Literal:
        if type(value) is not str or value not in get_args(hint):
            raise UserError(f"{path}={shown(value)}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        allowed = (float, int) if kind is float else (kind,)
        if not isinstance(value, list | tuple) or not all(type(item) in allowed for item in value):
            items = {str: "strings", int: "whole numbers", float: "numbers"}[kind]
            raise UserError(f"{path}={shown(value)}: expected a sequence of {items}")
        return tuple(_coerce(kind, item, f"{path}[{number}]") for number, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}: expected a float, and the integer that was given is too large for one") from None
    if type(value) is not hint:
        raise UserError(f"{path}={shown(value)}: expected {hint.__name__}, got {type(value).__name__}")
    return _text(value, path) if isinstance(value, str) else value


def _text(value: str, path: str) -> str:
    """Returns `value`. Raises UserError where UTF-8 cannot encode it, as for a command line in another encoding,
    because it could not be written to `config.json`."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}={value!r}: expected text in UTF-8 ({error.reason} at {error.start})") from error
    return value


def validate(config: Config) -> None:
    """Raises UserError that lists all numbers out of their range, or if there are none, all contradictions, and how to
    resolve them.
    """
    sections = [getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "name"]
    wrong = list(out_of_range(config)) or [problem for section in [*sections, config] for problem in section.problems()]
    if wrong:
        raise UserError("config: " + "\n  and: ".join(wrong))
