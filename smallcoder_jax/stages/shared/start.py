"""What a stage begins with: the model of an earlier one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from smallcoder_jax import loading
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, ModelConfig
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models import build, lora
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.task import Start, Task


def load_start(config: Config) -> LoadedModel | None:
    """The model that `stage.start` names. Raises UserError where there is none, or it has another shape."""
    if not config.stage.start:
        return None
    loaded = loading.load(Path(config.stage.start))
    check_shape(config.stage.start, loaded.model, config.model)
    return loaded


def need_start(config: Config, loaded: LoadedModel | None) -> LoadedModel:
    """Raises UserError where a stage that only makes sense after another has nothing to begin with."""
    if loaded is None:
        raise UserError(
            f"stage.name={config.stage.name} goes on with a model that exists: set --config.stage.start to the folder "
            "of a run or of an export"
        )
    return loaded


def check_shape(path: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Raises UserError naming the fields in which the model of `path` differs from the config's."""
    if found.family != wanted.family:
        raise UserError(f"the model in {path} is of another family: {found.family} there, {wanted.family} here")
    pairs = [
        (field.name, getattr(found, field.name), getattr(wanted, field.name)) for field in dataclasses.fields(found)
    ]
    may_differ = wanted.may_differ()
    differing = [
        f"model.{name}: {was} there, {now} here" for name, was, now in pairs if was != now and name not in may_differ
    ]
    if differing:
        raise UserError(f"the model in {path} has another shape than the config: {'; '.join(differing)}")


def check_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    """Raises UserError where data were prepared with another tokenizer than that of a model."""
    if tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(
            "the data have another tokenizer than the model that is to learn from them; take the model's with "
            f"--config.tokenizer.path={loaded.tokenizer_folder}"
        )


def start_of(loaded: LoadedModel | None) -> Start | None:
    """The start of a run, for the loop. A head stays behind: what it scores is its stage's own."""
    return None if loaded is None else Start({"model": loaded.params}, loaded.origin)


def with_base(config: Config, loaded: LoadedModel | None, task: Task) -> Task:
    """The task of a stage, with the model that it begins with frozen where adapters are trained beside it."""
    if not config.lora.rank:
        return task
    base = build.to_layout(need_start(config, loaded).params, config.compute)
    return dataclasses.replace(task, frozen={**task.frozen, **lora.beside(config.lora, base)})


def one_process(config: Config) -> None:
    """Raises UserError where several processes train a stage whose batches are made by one."""
    if jax.process_count() > 1:
        raise UserError(f"stage.name={config.stage.name} runs in one process, on all of its devices")
