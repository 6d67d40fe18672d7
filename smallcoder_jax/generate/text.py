"""Decodes tokens to text as they arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns the bytes of successive tokens into pieces of text whose concatenation is the completion.

    A character whose bytes are spread over several tokens is returned with the last of them. Invalid UTF-8 becomes
    U+FFFD, as in `Tokenizer.decode`. Text that may be the start of a stop string is held back until this is decided.
    """

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False  # a stop string was found, and the text ends before it

    def push(self, token_bytes: bytes) -> str:
        """The new text that is final after these bytes; empty once stopped."""
        return self._advance(self._decoder.decode(token_bytes), last=False)

    def finish(self) -> str:
        """The rest of the text, when there are no more tokens."""
        return self._advance(self._decoder.decode(b"", final=True), last=True)

    def _advance(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not last:
            keep = len(text) - self._undecided(text)
            text, self._held = text[:keep], text[keep:]
        return text

    def _undecided(self, text: str) -> int:
        """The number of characters at the end of `text` that could be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
