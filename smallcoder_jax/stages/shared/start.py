"""The start model of a stage: the model of an earlier stage."""

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
    """The model that `stage.start` names, or None. Raises UserError when it cannot be loaded or has another shape."""
    if not config.stage.start:
        return None
    loaded = loading.load(Path(config.stage.start))
    check_shape(config.stage.start, loaded.model, config.model)
    return loaded


def need_start(config: Config, loaded: LoadedModel | None) -> LoadedModel:
    """Returns `loaded`. Raises UserError when it is None, for a stage that needs a start model."""
    if loaded is None:
        raise UserError(
            f"stage.name={config.stage.name} starts from an existing model: set --config.stage.start to the folder of "
            "a run or of an export"
        )
    return loaded


def check_shape(path: str, found: ModelConfig, wanted: ModelConfig) -> None:
    """Raises UserError when the model in `path` has another shape than the config, naming the fields that differ."""
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
        fixed = "" if found.vocab_size == wanted.vocab_size else (
            ". A table of tokens does not grow between stages: train the first one with the tokenizer that all need"
        )  # fmt: skip
        raise UserError(f"the model in {path} has another shape than the config: {'; '.join(differing)}{fixed}")


def check_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    """Raises UserError when `tokenizer`, with which the data were prepared, is not the model's."""
    if tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(
            "the data were prepared with another tokenizer than the model's; use the model's with "
            f"--config.tokenizer.path={loaded.tokenizer_folder}"
        )


def start_of(loaded: LoadedModel | None) -> Start | None:
    """The start of a run for the training loop. A head is dropped, because its scores belong to its own stage."""
    return None if loaded is None else Start({"model": loaded.params}, loaded.origin)


def with_base(config: Config, loaded: LoadedModel | None, task: Task) -> Task:
    """The task of a stage. If adapters are trained, the start model is added to its frozen parts."""
    if not config.lora.rank:
        return task
    base = build.to_layout(need_start(config, loaded).params, config.compute)
    return dataclasses.replace(task, frozen={**task.frozen, **lora.beside(config.lora, base)})


def one_process(config: Config) -> None:
    """Raises UserError when there are several processes, for a stage whose batches are made by one."""
    if jax.process_count() > 1:
        raise UserError(f"stage.name={config.stage.name} runs in one process, on all of its devices")
