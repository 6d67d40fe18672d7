"""A stored conversation, and its side of the split. The side depends only on the words of the request, so that a
request in the held-out split never occurs in training."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.tokenizers.chat import Conversation
from smallcoder_jax.tokenizers.chat_wire import from_wire, to_wire

VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation, its side of the split (`train` or `validation`) and its provenance. For a generated conversation
    that is the seed, the index, the kind, the source of its code, and the version of Python that ran its calls."""

    conversation: Conversation
    side: str
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, with messages and tools in the format of OpenAI's API."""
        return {**to_wire(self.conversation), "side": self.side, "provenance": self.provenance}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Record:
        """The record that `to_json` wrote. Raises UserError, naming the place, for anything else."""
        try:
            side, provenance = value["side"], value["provenance"]
            conversation = from_wire({key: value[key] for key in ("messages", "tools")})
        except (KeyError, TypeError) as error:
            raise UserError(f"a record of a conversation has no {error}; make the conversations again") from error
        return cls(conversation, side, provenance)


def side_of(request: str) -> str:
    """`train` or `validation`, by a hash of the request that ignores case and whitespace."""
    words = " ".join(request.casefold().split())
    place = int.from_bytes(hashlib.sha256(b"request|" + words.encode("utf-8")).digest()[:8], "big")
    return "validation" if place < VALIDATION_SHARE * 2**64 else "train"
