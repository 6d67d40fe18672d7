"""Hardware presets: the config values that depend on the devices used for training.

python -m tools.train_all_variants --preset=v5e-16 --preflight      # whether every variant fits
python -m tools.train_all_variants --preset=v5e-16                  # trains them, on those devices
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, nearest


@dataclasses.dataclass(frozen=True)
class Preset:
    """Devices of one kind, as a mesh along `data`, and how many tokens each processes at a time.

    `topology`: the devices for preflight. `platform`: the platform whose environment training uses
    (`launch.platforms`). `tokens`: tokens per device in a forward pass; longer rows are processed one at a time.
    `batch_tokens`: tokens of a step over all devices; 0: as in the config. `settings`: all other settings.
    """

    topology: str
    platform: str
    devices: int
    tokens: int
    batch_tokens: int = 0
    settings: tuple[str, ...] = ()


PRESETS: Mapping[str, Preset] = {
    # For trying the variants. A CPU multiplies float32 faster than bfloat16, and layers in a loop take less memory.
    "cpu": Preset("cpu", "cpu", 1, 2048, 8192, ("compute.dtype=float32", "compute.layers=scan", "compute.remat=full")),
    "h200": Preset("h200:1x1", "gpu", 1, 32768),
    "h200x8": Preset("h200:1x8", "gpu", 8, 32768),
    "v5e-16": Preset("v5e:4x4", "tpu", 16, 4096),
    "v5p-16": Preset("v5p:2x2x4", "tpu", 16, 16384),
    "v6e-16": Preset("v6e:4x4", "tpu", 16, 8192),
}


def find_preset(name: str) -> Preset:
    """The preset of this name. Raises UserError, which lists all presets, if there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset={name} is not known; {nearest(name, list(PRESETS))}; all: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_overrides(preset: Preset, config: Config) -> list[str]:
    """The flags that fit `config` to the devices. The batch is rounded up so that it divides over them."""
    length = config.train.sequence_length
    wanted = max(preset.batch_tokens // length, 1) if preset.batch_tokens else config.train.batch_size
    rows = min(preset.tokens // length, -(-wanted // preset.devices))  # per device
    microbatch = max(rows, 1) * preset.devices
    settings = (
        f"mesh.data={preset.devices}",
        f"train.microbatch_size={microbatch}",
        f"train.batch_size={-(-wanted // microbatch) * microbatch}",
        "eval.batch_size=0",  # the same as a microbatch
        *preset.settings,
    )
    return [f"--config.{setting}" for setting in settings]
