"""Preference pairs for the stages that learn from them: preparation, batches, losses and measures.

Shapes: R rows, 2 the chosen and the rejected answers, B = 2 R, S slots for pairs, X = R S pairs, T positions, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.progress import Progress
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data.corpus.corpus import read_accounting
from smallcoder_jax.data.preferences.store import ensure_preferences, parse_preference_sources
from smallcoder_jax.data.rows.pairs import EncodedPair, PairBatches, encode_pairs, fitting
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.data.tokens.prepare import prepare_corpus
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.models.family import Hidden, Module, with_own_losses
from smallcoder_jax.stages.shared.start import one_process, start_of
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.train.evaluation import on_this_device
from smallcoder_jax.train.step import Batch, LossFn
from smallcoder_jax.train.sums import ratio
from smallcoder_jax.train.task import Task

Judged = tuple[Array, Array, dict[str, Array]]
APART = ("chosen_log_prob", "rejected_log_prob", "chosen_reward", "rejected_reward")  # sums of the stage dpo
Columns = Mapping[str, Mapping[str, np.ndarray]]  # by side, then by name


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of both sides of the split that fit a row, as ids. The column `criterion` has indices of `criteria`."""

    sides: dict[str, list[EncodedPair]]
    criteria: tuple[str, ...]
    dropped: dict[str, int]
    fingerprint: str
    folder: Path
    dummy: bool


def prepare(config: Config, tokenizer: Tokenizer, progress: Progress) -> Pairs:
    """The preferences of a config as ids of the tokenizer. They are created first if they are not on disk.

    Raises UserError for several processes, for rows that are split over devices, and for sources that cannot be read or
    give no pairs.
    """
    one_process(config)
    if config.mesh.context != 1:
        raise UserError(f"{config.mesh.context=}: stage.name={config.stage.name} needs whole rows; set it to 1")
    needs_code = "code" in parse_preference_sources(config.preferences.sources)
    corpus = prepare_corpus(config, progress) if needs_code else None
    found = ensure_preferences(config.preferences, Path(config.data.dir).expanduser(), corpus, progress)
    progress.note(f"preferences: {len(found.train):,} to train on, {len(found.validation):,} held out; {found.folder}")
    encoded = {side: encode_pairs(getattr(found, side), tokenizer) for side in SPLITS}
    sides = {side: fitting(encoded[side], config.train.sequence_length) for side in SPLITS}
    return Pairs(
        sides=sides,
        criteria=tuple(sorted({pair.criteria for side in SPLITS for pair in sides[side]})),
        dropped={side: len(encoded[side]) - len(sides[side]) for side in SPLITS},
        fingerprint=found.fingerprint,
        folder=found.folder,
        dummy=corpus is not None and read_accounting(corpus)["dummy"],
    )


def batches_of(
    config: Config, pairs: Pairs, side: str, columns: Columns, tokenizer: Tokenizer, batch_size: int, **order: Any
) -> PairBatches:
    """Batches of a side, with the `criterion` and the `columns` of each pair. `order` is passed to `PairBatches`."""
    places = {name: index for index, name in enumerate(pairs.criteria)}
    criterion = np.array([[places[pair.criteria]] for pair in pairs.sides[side]], np.int32)
    return PairBatches(
        pairs.sides[side],
        length=config.train.sequence_length,
        batch_size=batch_size,
        pad_id=tokenizer.pad_id,
        columns={"criterion": criterion, **columns.get(side, {})},
        **order,
    )


def make_task(
    config: Config, loaded: LoadedModel, pairs: Pairs, loss_fn: LossFn, columns: Columns, identity: dict[str, Any]
) -> Task:
    """A task on `pairs` with a loss whose sums come from `judge`. `columns` are additional numbers for each pair."""
    train, tokenizer = config.train, loaded.tokenizer

    def train_batches(rows: Sequence[int]) -> PairBatches:
        return batches_of(config, pairs, "train", columns, tokenizer, train.batch_size, rows=rows, seed=train.seed)

    def validation_batches(limit: int, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        order = {"rows": rows, "seed": 0, "num_epochs": 1}
        found = batches_of(config, pairs, "validation", columns, tokenizer, eval_rows(config), **order)
        return itertools.islice(found, limit or None)

    counts = {side: len(pairs.sides[side]) for side in SPLITS}
    return Task(
        loss_fn=loss_fn,
        summarise=summary,
        train_batches=train_batches,
        validation_batches=validation_batches,
        identity={
            "preferences": pairs.fingerprint,
            "tokenizer": tokenizer.hash,
            "sequence_length": train.sequence_length,
            "batch_size": train.batch_size,
            "seed": train.seed,
            **identity,
        },
        tokenizer=tokenizer,
        dataset=f"preferences of {config.preferences.sources}",
        dummy_data=pairs.dummy,
        facts={
            "preferences": f"{counts['train']:,} pairs to train on, {counts['validation']:,} held out; "
            f"{sum(pairs.dropped.values()):,} too long for a row",
            "criteria": ", ".join(pairs.criteria),
        },
        accounting={"preferences": str(pairs.folder), "pairs": counts, "too long for a row": pairs.dropped},
        reported=("accuracy", "margin"),
        start=start_of(loaded),
    )


def judge(loss_of: Callable[[Array], Judged], batch: Batch, criteria: Sequence[str], hidden: Hidden) -> Judged:
    """The loss of a batch, including the model's own losses. `loss_of` computes the stage's loss from weights of pairs.

    The sums include the stage's loss and, for each criterion, the accuracy and the weight.
    """
    weights_X, criterion_X = batch["pair_weights"].reshape(-1), batch["criterion"].reshape(-1)
    loss, weight, sums = loss_of(weights_X)
    sums = {**sums, "loss": loss}
    for index, name in enumerate(criteria):
        _, own, found = loss_of(jnp.where(criterion_X == index, weights_X, 0.0))
        sums |= {f"accuracy {name}": found["accuracy"], f"weight {name}": own}
    loss, sums = with_own_losses(loss, weight, sums, hidden)
    return loss, weight, sums


def summary(sums: dict[str, float]) -> dict[str, float]:
    """Means over pairs: `loss`, `accuracy` (how often the chosen answer scores higher), `margin`, accuracy by criterion
    and, in the stage dpo, `APART`: log-probabilities in nats and implicit rewards of whole answers.
    """
    found = {name: ratio(sums[name], sums["weight"]) for name in ("loss", "accuracy", "margin", *APART) if name in sums}
    for name, count in sums.items():
        if name.startswith("weight ") and count:
            criterion = name.removeprefix("weight ")
            found[f"accuracy_{criterion}"] = sums[f"accuracy {criterion}"] / count
    return found


def hidden_states(model: Module, batch: Batch, key: Array | None) -> Hidden:
    """The hidden states of the chosen and the rejected answers of every row, alternating along the first axis."""
    return model(answers(batch["tokens"]), answers(batch["positions"]), answers(batch["segment_ids"]), key)


def answers(x_R2T: Array) -> Array:
    """Reshapes [R, 2, T] to [B, T]."""
    return x_R2T.reshape(-1, x_R2T.shape[-1])


def by_pair(x_BS: Array) -> tuple[Array, Array]:
    """Splits values [B, S] into those of the chosen and of the rejected answers, [X] each."""
    x_R2S = x_BS.reshape(-1, 2, x_BS.shape[-1])
    return x_R2S[:, 0].reshape(-1), x_R2S[:, 1].reshape(-1)


def measure(
    config: Config, pairs: Pairs, loss_fn: LossFn, params: Any, columns: Columns, tokenizer: Tokenizer
) -> dict[str, float]:
    """`summary` over all held-out pairs."""
    rows = eval_rows(config)
    evaluation = on_this_device(config.compute, loss_fn, params, rows=rows, limit=0)
    order = {"rows": evaluation.rows, "seed": 0, "num_epochs": 1}
    batches = batches_of(config, pairs, "validation", columns, tokenizer, rows, **order)
    return summary(evaluation.add(map(evaluation.score, batches)) or {})
