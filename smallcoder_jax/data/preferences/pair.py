"""Preferences: a prompt, a better and a worse answer, and the criterion by which one is better.

A prompt is a text to continue, with answers that are texts, or a conversation whose next turn is the assistant's, with
answers that are a `Reply`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import open_regular, reason
from smallcoder_jax.data.conversations.record import side_of
from smallcoder_jax.data.sources.document import SPLITS
from smallcoder_jax.tokenizers.chat import Conversation, from_json
from smallcoder_jax.tokenizers.chat_wire import from_wire, to_wire


@dataclasses.dataclass(frozen=True)
class Reply:
    """A turn of an assistant: its content, and its calls, each as the text between its special pieces. As a model may
    write anything there, a call need not be JSON."""

    content: str
    calls: tuple[str, ...] = ()


Prompt = str | Conversation
Answer = str | Reply


@dataclasses.dataclass(frozen=True)
class Preference:
    """One pair. `criteria` is one word for what is wrong with the rejected answer, by which scores are reported.
    `reason` describes what is wrong in this pair. `provenance` holds plain JSON values."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    criteria: str
    reason: str = ""
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The pair as plain JSON values: texts unchanged, a conversation in the format of OpenAI's API, and a reply as
        an object."""
        return {
            "prompt": self.prompt if isinstance(self.prompt, str) else to_wire(self.prompt),
            "chosen": _answer_to_json(self.chosen),
            "rejected": _answer_to_json(self.rejected),
            "criteria": self.criteria,
            "reason": self.reason,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, value: Any) -> Preference:
        """The pair that `to_json` wrote; `criteria`, `reason` and `provenance` may be missing. Raises UserError for any
        other missing key, for a wrong type, and for two equal answers."""
        if not isinstance(value, dict):
            raise UserError(f"a preference is {value!r:.80}; expected an object with prompt, chosen and rejected")
        if missing := [key for key in ("prompt", "chosen", "rejected") if key not in value]:
            raise UserError(f"a preference has no {missing[0]}; expected prompt, chosen and rejected")
        given = value["prompt"]
        prompt = given if isinstance(given, str) else from_wire(given)
        if isinstance(prompt, Conversation) and prompt.messages[-1].role == "assistant":
            raise UserError("the prompt ends with a turn of the assistant; end it with the turn that is to be answered")
        chosen, rejected = (
            _answer_from_json(value[key], key, isinstance(prompt, str)) for key in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise UserError(f"chosen and rejected are both {value['chosen']!r:.80}; they have to differ")
        criteria, reason = value.get("criteria", "given"), value.get("reason", "")
        if not isinstance(criteria, str) or not criteria or not isinstance(reason, str):
            raise UserError(
                f"criteria is {criteria!r:.80} and reason {reason!r:.80}; both are text, criteria not empty"
            )
        provenance = value.get("provenance", {})
        if not isinstance(provenance, dict):
            raise UserError(f"provenance is {provenance!r:.80}; expected an object")
        return cls(prompt, chosen, rejected, criteria, reason, provenance)


def prompt_words(prompt: Prompt) -> str:
    """The words that determine a prompt's side of the split: the text, or what the user said in the conversation,
    without differences of case and whitespace."""
    if not isinstance(prompt, str):
        prompt = "\n".join(message.content for message in prompt.messages if message.role == "user")
    return " ".join(prompt.casefold().split())


def separate(sides: dict[str, list[Preference]]) -> dict[str, list[Preference]]:
    """The same pairs without duplicates. Pairs whose prompt is on both sides are kept only on the side that `side_of`
    gives for their words."""
    words = {side: {prompt_words(pair.prompt) for pair in sides[side]} for side in SPLITS}
    shared = words[SPLITS[0]] & words[SPLITS[1]]
    kept: dict[str, list[Preference]] = {}
    for side in SPLITS:
        own = {}
        for pair in sides[side]:
            said = prompt_words(pair.prompt)
            if said not in shared or side_of(said) == side:
                own.setdefault((said, pair.chosen, pair.rejected), pair)
        kept[side] = list(own.values())
    return kept


def write_preferences(path: Path, pairs: Iterable[Preference]) -> None:
    """Writes the pairs, one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in pairs)


def read_preferences(path: Path) -> Iterator[Preference]:
    """The pairs that `write_preferences` wrote. Raises UserError that names the file and the line."""
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield Preference.from_json(from_json(line.decode("utf-8")))
                    except (UserError, ValueError) as error:
                        raise UserError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {reason(error)}; give a file of preferences, one JSON object a line"
        ) from error


def _answer_to_json(answer: Answer) -> Any:
    return answer if isinstance(answer, str) else {"content": answer.content, "calls": list(answer.calls)}


def _answer_from_json(value: Any, key: str, to_text: bool) -> Answer:
    if to_text:
        if not isinstance(value, str):
            raise UserError(f"{key} is {value!r:.80}; expected text, as the prompt is")
        return value
    if isinstance(value, str):
        return Reply(value)
    calls = value.get("calls", []) if isinstance(value, dict) else None
    if not isinstance(calls, list) or not all(isinstance(item, str) for item in [value.get("content"), *calls]):
        raise UserError(f"{key} is {value!r:.80}; expected text, or an object with content and calls, which are texts")
    return Reply(value["content"], tuple(calls))
