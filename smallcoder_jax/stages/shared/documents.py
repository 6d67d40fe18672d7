"""Prepares and packs documents for a stage, describes them, and evaluates models on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base import distributed
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.base.terminal import human_count
from smallcoder_jax.config import Config, eval_rows, from_config_dict
from smallcoder_jax.data.rows import documents
from smallcoder_jax.data.tokens import shards
from smallcoder_jax.data.tokens.prepare import Prepared, prepare
from smallcoder_jax.data.tokens.shards import Manifest
from smallcoder_jax.data.tokens.verification import begin_verification
from smallcoder_jax.evaluate.bits_per_byte import held_out_references
from smallcoder_jax.evaluate.perplexity import evaluate
from smallcoder_jax.generate.utf8 import utf8_measures, writes_bytes
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.report.run_folder import RunFolder
from smallcoder_jax.train.evaluation import complete
from smallcoder_jax.train.step import LossFn
from smallcoder_jax.train.sums import language_summary
from smallcoder_jax.train.task import Start, Task
from smallcoder_jax.train.whereabouts import find_tokens

MOST_EPOCHS = 4


def prepare_on_all(config: Config, progress: Progress) -> Prepared:
    """Prepares the data on process 0. The other processes find them in a shared folder, or else prepare their own.

    Raises UserError when the processes end up with different data.
    """
    made: list[Prepared] = []

    def make() -> str:
        made.append(prepare(config, progress))
        return made[0].manifest.fingerprint

    fingerprint = distributed.from_first(make)
    prepared = made[0] if made else prepare(config, progress)
    if prepared.manifest.fingerprint != fingerprint:
        raise UserError(
            f"the data in '{config.data.dir}' of this machine have the fingerprint {prepared.manifest.fingerprint}, "
            f"but those of process 0 have {fingerprint}: '{config.data.sources}' differs between the machines. Set "
            "data.dir to a folder that all of them share, or copy the folder of process 0"
        )
    return prepared


def make_task(config: Config, prepared: Prepared, start: Start | None, loss_fn: LossFn, **more: Any) -> Task:
    """A task on packed documents of `prepared` with a loss that predicts their tokens. `more` holds further fields of
    the task; its `identity` is added to the documents'.
    """
    train, data = config.train, config.data

    def train_batches(rows: Sequence[int]) -> Any:
        return documents.make_train_iterator(
            prepared.manifest,
            prepared.tokens_folder,
            prepared.tokenizer,
            data=data,
            sequence_length=train.sequence_length,
            batch_size=train.batch_size,
            rows=rows,
            seed=train.seed,
        )

    def validation_batches(limit: int, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        return documents.validation_batches(
            prepared.manifest,
            prepared.tokens_folder,
            prepared.tokenizer,
            sequence_length=train.sequence_length,
            batch_size=eval_rows(config),
            rows=rows,
            limit_batches=limit,
        )

    train_tokens = sum(source.train.tokens for source in prepared.manifest.sources)
    validation_tokens = sum(source.validation.tokens for source in prepared.manifest.sources)
    planned = epochs(config, prepared.manifest)
    identity = documents.pipeline_identity(
        prepared.manifest, data, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    more = {"summarise": language_summary, **more}
    return Task(
        loss_fn=loss_fn,
        train_batches=train_batches,
        validation_batches=validation_batches,
        identity={**identity, **more.pop("identity", {})},
        tokenizer=prepared.tokenizer,
        manifest=prepared.manifest,
        verification=begin_verification(prepared.tokens_folder, prepared.manifest),
        dataset=data.sources,
        dummy_data=prepared.manifest.dummy,
        facts={
            "sources": data.sources + (" DUMMY DATA" if prepared.manifest.dummy else ""),
            "tokens": f"{human_count(train_tokens)} to train on, {human_count(validation_tokens)} held out; "
            f"epochs planned: {_epochs_in_words(planned)}",
            "rows": f"packing {data.packing}, FIM rate {data.fim_rate}, {data.workers} workers",
            **_unusable(config, prepared),
        },
        warnings=_repetition(planned),
        accounting={**prepared.accounting, "epochs_planned": planned},
        references=held_out_references(prepared) if distributed.is_first() else {},
        start=start,
        **more,
    )


def epochs(config: Config, manifest: Manifest) -> dict[str, float]:
    """The number of epochs that training makes over the documents of each source, by its spec."""
    train, sources = config.train, manifest.sources
    if config.data.packing == "document":  # one row per document, whatever its length
        weights = [source.weight * source.train.documents / max(source.train.tokens, 1) for source in sources]
        total, sizes = train.steps * train.batch_size, [source.train.documents for source in sources]
    else:
        weights = [source.weight for source in sources]
        total = train.steps * train.batch_size * train.sequence_length
        sizes = [source.train.tokens for source in sources]
    return {
        source.spec: total * weight / max(sum(weights), 1e-30) / max(size, 1)
        for source, weight, size in zip(sources, weights, sizes, strict=True)
    }


def _epochs_in_words(planned: Mapping[str, float]) -> str:
    counts = {spec: f"{count:.2f}" if count < 10 else f"{count:,.0f}" for spec, count in planned.items()}
    return ", ".join(f"{count} of {spec}" for spec, count in counts.items())


def _repetition(planned: Mapping[str, float]) -> tuple[str, ...]:
    often = {spec: count for spec, count in planned.items() if count > MOST_EPOCHS}
    if not often:
        return ()
    return (
        f"documents are repeated, epochs planned: {_epochs_in_words(often)}; after about {MOST_EPOCHS} a model learns "
        "little more from the same text (arXiv 2305.16264) and begins to memorise it: lower the weight or "
        "train.steps, or add data",
    )


def _unusable(config: Config, prepared: Prepared) -> dict[str, str]:
    """The number of documents that are too short to use, as a fact for the start table, if each row is one document."""
    data, manifest = config.data, prepared.manifest
    if data.packing != "document":
        return {}
    count = documents.count_unusable(manifest, prepared.tokens_folder, data.min_tokens)
    stored = sum(source.train.documents for source in manifest.sources)
    return {"unusable": f"{count:,} of {stored:,} documents, with fewer than {data.min_tokens} tokens"}


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    """Loss, perplexity, accuracy and bits per byte of a model on the whole split `eval.split`, and those of
    compressors; for a model of bytes, how much of what it writes is UTF-8.

    `data` in the result says which data were used, because an export does not know its own held-out documents. Raises
    UserError when the config's data or row length do not fit the model.
    """
    path = loaded.origin["path"]
    if config.train.sequence_length > loaded.model.context:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} is longer than the context of the model in "
            f"{path}, {loaded.model.context}; give the config and flags that it was trained with"
        )
    prepared = _evaluated_on(config, loaded, progress)
    fingerprint = prepared.manifest.fingerprint
    batches = documents.validation_batches(
        prepared.manifest,
        prepared.tokens_folder,
        prepared.tokenizer,
        sequence_length=config.train.sequence_length,
        batch_size=eval_rows(config),
        rows=range(eval_rows(config)),
        limit_batches=0,
        split=config.eval.split,
    )
    verification = begin_verification(prepared.tokens_folder, prepared.manifest)
    measured = evaluate(loaded.model, loaded.compute, loaded.params, batches)
    verification.wait()
    return {
        **measured,
        **_utf8_measures(config, loaded),
        "references": held_out_references(prepared, config.eval.split),
        "data": {
            "sources": config.data.sources,
            "fingerprint": fingerprint,
            "split": config.eval.split,
            "sequence_length": config.train.sequence_length,
        },
    }


def _utf8_measures(config: Config, loaded: LoadedModel) -> dict[str, float]:
    """Those of completions of the prompts in `eval`, for a model of bytes."""
    if not config.eval.sample_tokens or not writes_bytes(loaded.tokenizer):
        return {}
    return utf8_measures(complete(config, loaded.generator, config.eval.sample_prompts), loaded.tokenizer)


def _evaluated_on(config: Config, loaded: LoadedModel, progress: Progress) -> Prepared:
    """The data to evaluate on. The data that a run was trained on are recognised wherever they are, even without their
    sources.

    Raises UserError when the data differ from those that the model was trained on, or have another tokenizer.
    """
    path = Path(loaded.origin["path"])
    advice = "name the folder of its prepared data with --config.data.dir, or give the --config flags of its training"
    trained_on = None
    if "run" in loaded.info:  # an export knows nothing of its data
        trained_on = loaded.info["identity"]["data"].get("fingerprint")  # None for stages that read no documents
        own = from_config_dict(loaded.info["config"]).data
        if trained_on is not None and config.data == dataclasses.replace(own, dir=config.data.dir):
            tokens = find_tokens(RunFolder(path), config, loaded.info["run"], trained_on)
            if tokens is not None:
                manifest = shards.read_manifest(tokens)
                corpus = tokens.parents[1] / "corpus" / str(manifest.accounting.get("corpus"))
                return Prepared(manifest, tokens, loaded.tokenizer, loaded.tokenizer_folder, corpus)
    try:
        prepared = prepare(config, progress)
    except UserError as error:
        if trained_on is None:
            raise
        raise UserError(
            f"the data that {path} was trained on (fingerprint {trained_on[:12]}) are not in {config.data.dir}, and "
            f"cannot be prepared: {error}. To evaluate it, {advice}"
        ) from error
    if prepared.tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(
            f"{path} was not trained with the tokenizer in {prepared.tokenizer_folder}; give its own with "
            f"--config.tokenizer.kind and --config.tokenizer.path={loaded.tokenizer_folder}"
        )
    if trained_on not in (None, prepared.manifest.fingerprint):
        raise UserError(
            f"{path} was trained on data with the fingerprint {trained_on}, but '{config.data.sources}' has "
            f"{prepared.manifest.fingerprint}, whose held-out files may include files it was trained on; {advice}"
        )
    return prepared
