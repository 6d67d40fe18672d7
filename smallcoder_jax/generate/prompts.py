"""Converts text to the ids that a model is asked to continue, within the model's context."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.base import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, IM_END, IM_START, Tokenizer
from smallcoder_jax.tokenizers.chat import Conversation, encode, has_chat


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The ids that a model continues. `dropped` is the number of tokens that were left out because they did not fit."""

    text: str
    ids: tuple[int, ...]
    dropped: int = 0


@dataclasses.dataclass(frozen=True)
class Room:
    """The number of tokens that a prompt may have, and whether a longer one is truncated or refused."""

    context: int
    max_tokens: int
    truncate: bool

    @property
    def tokens(self) -> int:
        return self.context - self.max_tokens

    def refuse(self, given: int) -> UserError:
        """The error for a prompt of `given` tokens."""
        advice = "shorten the prompt or lower max_tokens"
        if not self.truncate:
            advice += ", or set truncate_prompt (--truncate) to leave out what is farthest from the completion"
        return UserError(
            f"the prompt has {given} tokens and max_tokens={self.max_tokens} more are asked for, but the model's "
            f"context is {self.context} tokens; {advice}"
        )


def from_text(tokenizer: Tokenizer, text: str, room: Room) -> Prompt:
    """BOS and the text. Of a prompt that is too long, the last tokens that fit are kept, without BOS, like a later
    piece of a document in training.
    """
    return _keep_end(tokenizer, [tokenizer.bos_id, *_encode(tokenizer, text)], text, room)


def from_ids(tokenizer: Tokenizer, ids: Sequence[int], room: Room) -> Prompt:
    """The ids as they are. Raises UserError when there are none or too many, or one is outside the vocabulary."""
    if isinstance(ids, Mapping) or (isinstance(ids, Sequence) and any(isinstance(i, Mapping) for i in ids)):
        raise UserError(
            "a prompt is text or a list of ids, and this is a message of a conversation; model.chat(messages) answers "
            "a conversation"
        )
    if isinstance(ids, bytes) or not isinstance(ids, Sequence) or not all(isinstance(i, Integral) for i in ids):
        raise UserError(f"the prompt is {ids!r:.60}, of type {type(ids).__name__}; expected text or a list of ids")
    if not ids:
        raise UserError("the prompt has no tokens; give at least one id, for example BOS")
    unknown = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if unknown:
        raise UserError(
            f"the prompt has the id {unknown[0]}, but the tokenizer's ids are 0 to {tokenizer.vocab_size - 1}; encode "
            "the prompt with the checkpoint's own tokenizer"
        )
    return _keep_end(tokenizer, list(ids), tokenizer.decode(list(ids)), room)


def next_turn(tokenizer: Tokenizer, conversation: Conversation, room: Room) -> Prompt:
    """A conversation and the header of the assistant's next turn.

    When it is too long, the oldest exchanges are dropped, each as a whole: from one user message up to the next. The
    system message and the tools are kept. Raises UserError for an invalid conversation, and for a tokenizer without the
    pieces of turns.
    """
    if not has_chat(tokenizer):
        raise UserError(
            f"this checkpoint's tokenizer has no {IM_START} and {IM_END}, so it cannot hold a conversation; use a "
            "model that was trained on conversations (stage.name=sft), or complete from a plain prompt"
        )
    messages = conversation.messages
    if messages and messages[-1].tool_calls:
        raise UserError(
            f"messages[{len(messages) - 1}] calls functions, and is the last; give a message of the role tool for each "
            "call, with its response"
        )
    first = int(bool(messages) and messages[0].role == "system")

    def ids_from(start: int) -> list[int]:
        kept = dataclasses.replace(conversation, messages=messages[:first] + messages[start:])
        return encode(kept, tokenizer, reply=True).ids.tolist()

    given = ids = ids_from(first)
    if len(given) > room.tokens and room.truncate:
        starts = [i for i in range(first + 1, len(messages)) if messages[i].role == "user"]
        fits = bisect.bisect_left(starts, True, key=lambda start: len(ids_from(start)) <= room.tokens)
        ids = ids_from(starts[min(fits, len(starts) - 1)]) if starts else given
    if len(ids) > room.tokens:
        raise room.refuse(len(ids))
    return Prompt(tokenizer.decode(ids), tuple(ids), len(given) - len(ids))


def fill_in_middle(tokenizer: Tokenizer, prefix: str, suffix: str, room: Room) -> Prompt:
    """A prompt in prefix-suffix-middle order (Bavarian et al., arXiv 2207.14255): the model writes the middle after it.

    When it is too long, the tokens next to the gap are kept. Each side gets half of the room, and what one side does
    not use goes to the other.
    """
    missing = [piece for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE) if piece not in tokenizer.specials]
    if missing:
        raise UserError(
            f"this checkpoint's tokenizer has no {', '.join(missing)}, so it cannot fill in the middle; use a model "
            "trained with a sentencepiece or bytes tokenizer, or complete from a plain prompt"
        )
    before, after = _encode(tokenizer, prefix), _encode(tokenizer, suffix)
    frame = 4  # BOS and the three pieces
    given, budget = len(before) + len(after), room.tokens - frame
    if given > budget and (not room.truncate or budget < 1):
        raise room.refuse(given + frame)
    after_kept = after[: _character_start(tokenizer, after, max(budget // 2, budget - len(before)), -1)]
    before_kept = before[_character_start(tokenizer, before, len(before) - (budget - len(after_kept)), 1) :]
    specials = tokenizer.specials
    ids = (
        tokenizer.bos_id, specials[FIM_PREFIX], *before_kept, specials[FIM_SUFFIX], *after_kept, specials[FIM_MIDDLE],
    )  # fmt: skip
    return Prompt(prefix, ids, given - len(before_kept) - len(after_kept))


def _keep_end(tokenizer: Tokenizer, ids: list[int], text: str, room: Room) -> Prompt:
    dropped = len(ids) - room.tokens
    if dropped > 0 and (not room.truncate or room.tokens < 1):
        raise room.refuse(len(ids))
    dropped = min(_character_start(tokenizer, ids, dropped, 1), len(ids) - 1)
    return Prompt(text, tuple(ids[dropped:]), dropped)


def _character_start(tokenizer: Tokenizer, ids: Sequence[int], place: int, step: int) -> int:
    """The place in `ids` nearest to `place`, in the direction of `step`, where no character is cut in two. A character
    beyond ASCII has several bytes, and may have as many ids."""
    place, pieces = min(max(place, 0), len(ids)), tokenizer.token_bytes
    while 0 < place < len(ids) and 0x80 <= (pieces[ids[place]] or b"\0")[0] < 0xC0:
        place += step
    return place


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not valid Unicode at character {error.start}: {text[error.start]!r}; give it as UTF-8"
        ) from error
    return tokenizer.encode(text)
