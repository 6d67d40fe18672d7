"""Preferences: a prompt, an answer that is better, one that is worse, and by which criterion.

A prompt is a text to be continued, or a conversation whose next turn is the assistant's. The answer to the first is a
text, to the second a `Reply`.
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
    """What an assistant wrote: its content, then calls, each as the text between its pieces. A model may write anything
    there, so a call need not be JSON."""

    content: str
    calls: tuple[str, ...] = ()


Prompt = str | Conversation
Answer = str | Reply


@dataclasses.dataclass(frozen=True)
class Preference:
    """One pair. `criteria` names what the rejected answer lacks, in one word that scores are reported by; `reason` says
    it of this pair; `provenance` is plain JSON values."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    criteria: str
    reason: str = ""
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: texts as they are, a conversation in the shape of OpenAI's API, a reply as an object."""
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
        """What `to_json` wrote, or less: `criteria`, `reason` and `provenance` may be missing. Raises UserError for
        what else is missing or of another type, and for two answers that are the same."""
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
    """What the side of a prompt goes by: the text, or what the user said in the conversation; case and whitespace do
    not count."""
    if not isinstance(prompt, str):
        prompt = "\n".join(message.content for message in prompt.messages if message.role == "user")
    return " ".join(prompt.casefold().split())


def separate(sides: dict[str, list[Preference]]) -> dict[str, list[Preference]]:
    """The same, but for pairs that are there before, and for prompts that are on both sides: they stay on the one that
    their words say (`conversations.side_of`)."""
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
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in pairs)


def read_preferences(path: Path) -> Iterator[Preference]:
    """The pairs that `write_preferences` wrote. Raises UserError, naming file and line."""
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
