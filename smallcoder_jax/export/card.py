"""The model card.

`card` is a dict of plain values: `name`; and, where known, `training` and `evaluation` (what to value, as shown), `data`
(`dummy`, `fingerprint`, `sources`: a list of `spec`, `weight`, `documents`, `tokens`, `bytes`; `licenses`: licence to
number of documents) and `parity` (`ParityReport.record`). What is not known is said not to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from smallcoder_jax.config import ModelConfig
from smallcoder_jax.models import build

_KINDS = {"rmsnorm": "A decoder in the style of Llama", "layernorm": "A decoder in the style of GPT-2"}


def render(model: ModelConfig, card: Mapping[str, Any], *, dtype: str, fim: Sequence[str], chat: bool) -> str:
    """The README.md of an exported folder. `fim`: the pieces prefix, middle and suffix, empty where there are none."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smallcoder_jax.export", "templates"),
        autoescape=False,  # Markdown; `cell` keeps values inside their cell
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("model_card.md.jinja").render(
        model=model,
        card=card,
        dtype=dtype,
        fim=fim,
        chat=chat,
        kind=_KINDS[model.norm],
        parameters=build.parameter_count(model),
    )


def _cell(value: Any) -> str:
    """A value on one line of a Markdown table, with nothing in it that ends the cell or begins markup."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(str(value).split())
    for character in "\\|<`*[":
        text = text.replace(character, "\\" + character)
    return text
