"""smallcoder_jax: from a folder of source code to your own small code model.

    import smallcoder_jax as sc
    run = sc.train(config, "runs/mine")        # config: a ConfigDict, a Config, or the path of a config file
    model = sc.load("runs/mine")               # or an exported folder
    print(model.generate("def main():")[0].text)
    print(model.chat([{"role": "user", "content": "Hello."}]).content)  # for a model trained on conversations

Importing the package touches no device.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallcoder_jax.base.environment import check_environment

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from smallcoder_jax.config import Config
    from smallcoder_jax.loading import LoadedModel
    from smallcoder_jax.run import Run

check_environment()
# The first import of the subpackage `train` sets an attribute `train` of this package. It is imported here so that the
# function below replaces that attribute, and not the other way round.
importlib.import_module("smallcoder_jax.train")


def train(config: Config | ConfigDict | str | Path, workdir: str | Path) -> Run:
    """Trains, or continues, the run in `workdir`. Returns its folder, last step and evaluation.

    Raises smallcoder_jax.base.errors.UserError, with advice, when config, data or workdir do not fit.
    """
    from smallcoder_jax import run
    from smallcoder_jax.config import Config, from_config_dict
    from smallcoder_jax.configfile import load_config

    if isinstance(config, str | Path):
        config = load_config(str(config), [])
    elif not isinstance(config, Config):
        config = from_config_dict(config)
    return run.train(config, Path(workdir))


def load(path: str | Path, *, step: int | str | None = None) -> LoadedModel:
    """The model in a run folder (its best step, or `step`) or in an exported folder, ready to generate.

    Raises smallcoder_jax.base.errors.UserError when there is none or when its checksums do not match.
    """
    from smallcoder_jax import loading

    return loading.load(Path(path), step=step)


__all__ = ["load", "train"]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'smallcoder_jax' has no attribute {name!r}; public: {', '.join(__all__)}")
