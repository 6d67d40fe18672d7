"""Fine-tuning on conversations: next-token prediction of the assistant's turns, including the token that ends them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smallcoder_jax.base.progress import Progress
from smallcoder_jax.base.terminal import human_count
from smallcoder_jax.config import Config, eval_rows
from smallcoder_jax.data.conversations.given import prepare_dialogs
from smallcoder_jax.data.conversations.record import Record
from smallcoder_jax.data.conversations.store import Dialogs
from smallcoder_jax.data.conversations.tools import prepare_tool_dialogs
from smallcoder_jax.data.rows.conversations import ConversationBatches
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.evaluate.tool_calls import score_tool_calls
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.loading import LoadedModel
from smallcoder_jax.stages.shared import next_token
from smallcoder_jax.stages.shared.start import need_start, start_of
from smallcoder_jax.tokenizers import chat
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.toolbox.execute import execute
from smallcoder_jax.train.sums import language_summary
from smallcoder_jax.train.task import Task

_SHOWN = 2  # held-out conversations whose first turn is sampled during training
_ANSWER_TOKENS = 256  # at most, of a turn whose calls are scored
_SCORED_ROWS = 32  # turns generated at a time


def prepare(config: Config, progress: Progress | None) -> Dialogs:
    """The conversations of a config. They are created first if they are not on disk."""
    settings = config.dialogs
    if settings.source:
        return prepare_dialogs(Path(config.data.dir), settings.source, settings.count, progress)
    return prepare_tool_dialogs(Path(config.data.dir), settings.count, settings.seed, execute, progress)


def make_task(config: Config, loaded: LoadedModel | None, progress: Progress) -> Task:
    """The task. Raises UserError when there is no start model, or its tokenizer has no pieces for turns."""
    loaded = need_start(config, loaded)
    tokenizer, train = loaded.tokenizer, config.train
    dialogs = prepare(config, progress)
    encoded = {side: _encode(dialogs.read(side), tokenizer) for side in SPLITS}

    def batches(side: str, rows: Sequence[int], batch_size: int, **order: Any) -> ConversationBatches:
        return ConversationBatches(
            encoded[side],
            length=train.sequence_length,
            batch_size=batch_size,
            rows=rows,
            pad_id=tokenizer.pad_id,
            packed=config.dialogs.packed,
            **order,
        )

    def validation_batches(limit: int, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        found = batches("validation", rows, eval_rows(config), seed=0, num_epochs=1)
        return itertools.islice(found, limit or None)

    shown = dialogs.read("validation")[:_SHOWN]
    counted = {side: sum(int(item.counted.sum()) for item in encoded[side]) for side in encoded}
    too_long = sum(len(item) - 1 > train.sequence_length for item in encoded["train"])
    return Task(
        loss_fn=next_token.make_loss(config),
        summarise=language_summary,
        train_batches=lambda rows: batches("train", rows, train.batch_size, seed=train.seed),
        validation_batches=validation_batches,
        identity={
            "dialogs": dialogs.fingerprint,
            "tokenizer": tokenizer.hash,
            "packed": config.dialogs.packed,
            "sequence_length": train.sequence_length,
            "batch_size": train.batch_size,
            "seed": train.seed,
        },
        tokenizer=tokenizer,
        dataset=config.dialogs.source or f"{dialogs.counts['train']:,} generated conversations that call functions",
        dummy_data=False,
        facts={
            "conversations": f"{dialogs.counts['train']:,} to train on, {dialogs.counts['validation']:,} held out, "
            f"{config.dialogs.source or 'their calls executed'}; {too_long} too long for a row",
            "tokens": f"{human_count(counted['train'])} of the assistant to train on",
        },
        accounting={
            "conversations": dialogs.counts,
            "first unusable rows": list(dialogs.unusable),
            "tokens of the assistant": counted,
        },
        start=start_of(loaded),
        prompts=dict(_asked(record, tokenizer) for record in shown),
    )


def measure(config: Config, loaded: LoadedModel, progress: Progress) -> dict[str, float]:
    """Shares of correct turns (`tool_calls.ToolScores`) in the first `eval.batches` x rows held-out conversations."""
    records = prepare(config, progress).read("validation")
    limit = config.eval.batches * eval_rows(config)

    def generate(prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
        room = min(_ANSWER_TOKENS, loaded.model.context // 2)
        options = SamplingOptions(max_tokens=room, temperature=0.0, truncate_prompt=True)
        return [found.token_ids for found in loaded.generator.generate(prompts, options, _SCORED_ROWS)]

    scores = score_tool_calls([record.conversation for record in records[: limit or None]], loaded.tokenizer, generate)
    shares = {name: getattr(scores, name).share for name in ("valid_json", "right_tool", "right_arguments")}
    shares |= {"no_call": scores.no_call.share, "ended": scores.ended.share}
    return {name: share for name, share in shares.items() if share is not None}


def _encode(records: Sequence[Record], tokenizer: Tokenizer) -> list[chat.Encoded]:
    return [chat.encode(record.conversation, tokenizer) for record in records]


def _asked(record: Record, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The request of a conversation, and the prompt for the assistant's first turn."""
    messages = record.conversation.messages
    first = next(index for index, message in enumerate(messages) if message.role == "assistant")
    before = chat.Conversation(messages[:first], record.conversation.tools)
    return messages[first - 1].content, chat.encode(before, tokenizer, reply=True).ids.tolist()
