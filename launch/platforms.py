"""The environment variables that are set for a platform before training, and why. They can be printed for a shell:

    eval "$(python -m launch.platforms gpu)"

A variable that is already set is not changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from typing import NamedTuple


class Setting(NamedTuple):
    variable: str
    value: str
    reason: str


# No XLA flag is set for TPUs. The flags that XLA's guide recommends for them (asynchronous all-gathers, fused with
# compute) are libtpu's defaults, and the guide's other flags would have to be measured first, which was not done.
PLATFORMS: Mapping[str, tuple[Setting, ...]] = {
    "cpu": (
        Setting("JAX_PLATFORMS", "cpu", "never waits for an accelerator that another program holds"),
        Setting("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "large pages for a step's memory (BUILD.md)"),
    ),
    "gpu": (
        Setting("JAX_PLATFORMS", "cuda", "fails without a working driver, instead of running slowly on the CPU"),
        Setting(
            "XLA_FLAGS",
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "moves collectives so that they overlap with computation (JAX, GPU performance tips)",
        ),
        Setting(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "0.9",
            "JAX reserves three quarters of the memory by default; nothing else runs on these GPUs",
        ),
    ),
    "tpu": (Setting("JAX_PLATFORMS", "tpu", "fails without a TPU, instead of running slowly on the CPU"),),
}


def settings_of(platform: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `environment` for a platform."""
    return {setting.variable: setting.value for setting in PLATFORMS[platform] if not environment.get(setting.variable)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.platforms", description=__doc__)
    parser.add_argument("platform", choices=sorted(PLATFORMS))
    platform = parser.parse_args().platform
    missing = settings_of(platform, os.environ)
    for setting in PLATFORMS[platform]:
        if setting.variable in missing:
            print(f"export {setting.variable}={shlex.quote(setting.value)}  # {setting.reason}")


if __name__ == "__main__":
    main()
