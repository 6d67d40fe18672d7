"""A conversation as it is kept, and its side of the split, by the words of its request alone: what is tested on was
never learned from."""

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
    """A conversation, its side of the split (`train` or `validation`) and where it is from: seed, index, kind, source
    of its code, and the version of Python that answered."""

    conversation: Conversation
    side: str
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; messages and tools in the shape of OpenAI's API."""
        return {**to_wire(self.conversation), "side": self.side, "provenance": self.provenance}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Record:
        """What `to_json` wrote. Raises UserError, naming the place, for anything else."""
        try:
            side, provenance = value["side"], value["provenance"]
            conversation = from_wire({key: value[key] for key in ("messages", "tools")})
        except (KeyError, TypeError) as error:
            raise UserError(f"a record of a conversation has no {error}; make the conversations again") from error
        return cls(conversation, side, provenance)


def side_of(request: str) -> str:
    """`train` or `validation`, by a hash of the request; case and whitespace do not count."""
    words = " ".join(request.casefold().split())
    place = int.from_bytes(hashlib.sha256(b"request|" + words.encode("utf-8")).digest()[:8], "big")
    return "validation" if place < VALIDATION_SHARE * 2**64 else "train"
