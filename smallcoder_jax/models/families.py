"""The families of models, by the name that `model.family` has: the one place that knows them all."""

from __future__ import annotations

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.models.family import Family
from smallcoder_jax.models.published import Published

FAMILIES: dict[str, Family] = {
    "decoder": DECODER,
}


def family_of(model: ModelConfig) -> Family:
    return FAMILIES[model.family]


def published(model: ModelConfig) -> Published:
    """How others know models of this family. Raises UserError where they do not."""
    found = family_of(model).published
    if isinstance(found, str):
        raise UserError(f"a model with model.family={model.family!r} cannot be exported: {found}")
    return found


def all_published() -> list[Published]:
    """Those of all families that others know."""
    return [family.published for family in FAMILIES.values() if not isinstance(family.published, str)]
