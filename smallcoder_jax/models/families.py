"""The families of models by name (`model.family`). This is the only place that lists them all."""

from __future__ import annotations

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.models.decoder.family import DECODER
from smallcoder_jax.models.family import Family
from smallcoder_jax.models.hnet.family import HNET
from smallcoder_jax.models.published import Published

FAMILIES: dict[str, Family] = {
    "decoder": DECODER,
    "hnet": HNET,
}


def family_of(model: ModelConfig) -> Family:
    return FAMILIES[model.family]


def published(model: ModelConfig) -> Published:
    """The published format of this model's family. Raises UserError when it has none."""
    found = family_of(model).published
    if isinstance(found, str):
        raise UserError(f"a model with model.family={model.family!r} cannot be exported: {found}")
    return found


def all_published() -> list[Published]:
    """The published formats of all families that have one."""
    return [family.published for family in FAMILIES.values() if not isinstance(family.published, str)]
