"""Reads a Hugging Face folder that `write` or `transformers` wrote, of any `model_type` that a family supports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smallcoder_jax import config as config_module
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import read_json_object
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.huggingface import names, record, weights
from smallcoder_jax.models import build
from smallcoder_jax.models.families import all_published
from smallcoder_jax.models.published import Settings, shown

CONFIG = "config.json"
PACKED = "packed"  # its field that says whether ternary kernels are packed


class Export(NamedTuple):
    """The content of a folder. `params` are unrolled, float32, numpy. `load_tokenizer` reads `tokenizer_folder`."""

    model: ModelConfig
    params: build.Params
    tokenizer_folder: Path


def read_export(folder: Path) -> Export:
    """Reads a folder that `write_export` or `transformers` wrote. Code that is in it is not executed.

    Raises UserError that names the file and the field or tensor that is missing, unknown, of another shape or type, or
    not supported by any family of models. Also raises UserError when a file of an export has changed since it was
    written.
    """
    record.verify(folder)
    settings = _read_json(folder / CONFIG)
    readers = {kind: reader for told in all_published() for kind, reader in told.readers.items()}
    model = readers[_one_of(folder, settings, "model_type", sorted(readers))](Settings(folder / CONFIG, settings))
    try:
        # For any context, because nothing is trained or sampled here.
        train, evaluation = config_module.TrainConfig(sequence_length=1), config_module.EvalConfig(sample_tokens=0)
        config_module.validate(config_module.Config(model=model, train=train, eval=evaluation))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    packed = Settings(folder / CONFIG, settings).get(PACKED, bool, False)
    if packed:
        names.check_packable(model)
    return Export(model, weights.read(folder, model, packed=packed), folder)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "an exported model's folder; export or download the model again")


def _one_of(folder: Path, settings: Mapping[str, Any], key: str, known: list[str]) -> str:
    if settings.get(key) not in known:
        raise UserError(f"{folder / CONFIG}: {key} is {shown(settings.get(key))}; supported: {', '.join(known)}")
    return settings[key]
