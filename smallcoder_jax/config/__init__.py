"""The one schema of a run: sections of typed fields with their ranges, and what must hold between them."""

from smallcoder_jax.config.data import DataConfig, DialogConfig, PreferencesConfig, TokenizerConfig
from smallcoder_jax.config.model import ComputeConfig, MeshConfig, ModelConfig, parameter_count
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
from smallcoder_jax.config.stages import DistillConfig, DpoConfig, LoraConfig, RLConfig, StageConfig
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
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DialogConfig",
    "DistillConfig",
    "DpoConfig",
    "EvalConfig",
    "GuardConfig",
    "LogConfig",
    "LoraConfig",
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
    "parameter_count",
    "profiled_steps",
    "to_dict",
    "validate",
]
