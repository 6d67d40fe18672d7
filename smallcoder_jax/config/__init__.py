"""The one schema of a run's config: sections of typed fields with their ranges, and the constraints between fields."""

from smallcoder_jax.config.data import DataConfig, DialogConfig, PreferencesConfig, TokenizerConfig
from smallcoder_jax.config.hnet import HnetConfig
from smallcoder_jax.config.model import AttentionShape, ComputeConfig, DecoderConfig, MeshConfig, ModelConfig
from smallcoder_jax.config.schema import (
    Config,
    build,
    default_config,
    eval_rows,
    evaluated_on,
    from_config_dict,
    nearest,
    to_dict,
    validate,
)
from smallcoder_jax.config.stages import KINDS, DistillConfig, DpoConfig, LoraConfig, Measure, RLConfig, StageConfig
from smallcoder_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    profiled_steps,
)

__all__ = [
    "KINDS",
    "AttentionShape",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "DialogConfig",
    "DistillConfig",
    "DpoConfig",
    "EvalConfig",
    "GuardConfig",
    "HnetConfig",
    "LogConfig",
    "LoraConfig",
    "Measure",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferencesConfig",
    "RLConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "build",
    "default_config",
    "eval_rows",
    "evaluated_on",
    "from_config_dict",
    "nearest",
    "profiled_steps",
    "to_dict",
    "validate",
]
