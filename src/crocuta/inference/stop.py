"""Text as it grows, token by token, and where it must stop."""

from __future__ import annotations

from collections.abc import Sequence

from crocuta.tokenizers.base import Tokenizer


class StopText:
    """Decodes one row's tokens and looks for stop strings; text that may be the start of one is held back."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = None if tokenizer is None else tokenizer.incremental_decoder()
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, token: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string was completed); the stop string is never returned."""
        if self._decoder is None:
            return "", False
        self._held += self._decoder.feed(token)
        found = [self._held.find(s) for s in self._stop if s in self._held]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        certain = len(self._held) - self._pending()
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def finish(self) -> str:
        """The text held back so far, now that no more comes."""
        if self._decoder is None:
            return ""
        text, self._held = self._held + self._decoder.finish(), ""
        found = [text.find(s) for s in self._stop if s in text]
        return text[: min(found)] if found else text

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
