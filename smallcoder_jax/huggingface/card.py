"""Writes the model card.

`card` is a dict of plain values: `name` and, if known,

    training, evaluation  rows of a table, name -> value
    data                  `dummy`, `fingerprint`, `sources` (a list of `spec`, `weight`, `documents`, `tokens`, `bytes`)
                          and `licenses` (licence to number of documents)
    parity                `huggingface.parity.ParityReport.record`

For values that are missing, the card says that they are not known.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from smallcoder_jax.base.display import code, markdown, one_line
from smallcoder_jax.config import Config, ModelConfig, evaluated_on
from smallcoder_jax.data.tokens.shards import Manifest
from smallcoder_jax.models.families import published

# The folders of a path from the root, the home or the current folder, at the start of a word or value.
_FOLDERS = re.compile(r"""(?<![^\s:;,=("'])(?:~[\w.-]*|\.{0,2})/(?![\s/])(?:[^:;,?"']*/)?(?=[^\s/])""")


def render(
    model: ModelConfig, card: Mapping[str, Any], *, dtype: str, fim: Sequence[str], chat: bool, packed: bool = False
) -> str:
    """The README.md of an exported folder. `fim` holds the prefix, middle and suffix pieces, if there are any."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smallcoder_jax.huggingface", "templates"),
        autoescape=False,  # Markdown; `cell` keeps values inside their cell, `code` inside their span
        finalize=lambda value: one_line(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "code": code}
    told = published(model)
    kind, shape = told.describe(model)
    return environment.get_template("model_card.md.jinja").render(
        model=model,
        card=card,
        dtype=dtype,
        packed=packed,
        files=[path.name for path in told.code],
        in_float64=told.decide is not None,
        fim=fim,
        chat=chat,
        kind=kind,
        shape=shape,
        parameters=model.parameter_count(),
    )


def without_folders(value: Any) -> Any:
    """A copy of a card's content in which every path is shortened to its last name.

    The folders of the machine that a model was trained on are of no use to others, and can contain people's names.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    """A value escaped for a cell of a Markdown table: on one line, and without anything that starts markup."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "not known"
    return markdown(str(value))


@dataclasses.dataclass(frozen=True)
class Trained:
    """One stage of the training of a model.

    `meta` is the meta.json of its checkpoint, and `dataset` describes its data. `manifest` is the manifest of its token
    shards. It is None when the stage read no documents, or when the shards are missing; then the card has only the
    facts that `meta` stores.
    """

    meta: Mapping[str, Any]
    dataset: str
    manifest: Manifest | None


def of_run(config: Config, lineage: Sequence[Trained], references: Mapping[str, float]) -> dict[str, Any]:
    """The card of one checkpoint. `lineage` lists its stages, first to last. `references` are the bits per byte of
    compressors on the held-out text.
    """
    train, meta = config.train, lineage[-1].meta
    documents = [each for each in lineage if "fingerprint" in each.meta["identity"]["data"]]
    stages = [f"{each.meta['config']['name']}: {each.meta['step']:,} steps on {each.dataset}" for each in lineage]
    training = {
        **({"stages": "; ".join(stages)} if len(stages) > 1 else {}),
        "steps": meta["step"],
        "tokens seen": meta["tokens_seen"],
        "rows of a batch": train.batch_size,
        "tokens of a row": train.sequence_length,
        "optimizer": f"{config.optimizer.name}, {config.optimizer.schedule} schedule",
        "fill-in-the-middle": f"{config.data.fim_rate:.0%} of documents",
        "packing": config.data.packing,
        "precision": config.compute.dtype,
    }
    evaluation = {name.replace("_", " "): value for name, value in meta["evaluation"].items()}
    if evaluation:  # the compressors were given more text, so the names say which
        evaluation["evaluated on"] = evaluated_on(config)
    evaluation |= {f"bits per byte of all held-out files, {name}": value for name, value in references.items()}
    return {
        "name": config.name,
        "training": training,
        "evaluation": evaluation,
        "data": {
            "dummy": any(each.meta["dummy_data"] for each in lineage),
            "fingerprint": ", ".join(each.meta["identity"]["data"]["fingerprint"] for each in documents),
            "sources": [
                _source(each.manifest, index, kept)
                for each in documents
                for index, kept in enumerate(each.meta["identity"]["data"]["sources"])
            ],
            "licenses": _licenses([each.manifest for each in documents if each.manifest]),
        },
    }


def _source(manifest: Manifest | None, index: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    source = {"spec": kept["spec"], "weight": kept["weight"], "documents": kept["documents"]}
    train = manifest.sources[index].train if manifest else None
    return {**source, "tokens": train.tokens if train else None, "bytes": train.bytes if train else None}


def _licenses(manifests: Sequence[Manifest]) -> dict[str, int]:
    """The number of documents per licence over all sources, largest first."""
    counts: collections.Counter[str] = collections.Counter()
    for manifest in manifests:
        for source in manifest.accounting.get("sources", []):
            counts.update(source["statistics"]["licenses"])
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
