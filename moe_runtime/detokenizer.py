"""From token ids, one at a time, to text that may be shown: whole characters, no half stop strings.

What was shown is never taken back: the pieces, put together, are exactly what decoding all ids at once gives.
"""

import codecs
from collections.abc import Sequence

from moe_runtime.tokenizer import BYTE_TOKEN, Tokenizer

CONTEXT_TOKENS = 8


class ByteDetokenizer:
    """For byte-level vocabularies: every token is known bytes, so only UTF-8 is incremental."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        token = None if token_id in self._tokenizer.special_ids else self._tokenizer.token(token_id)
        return self._utf8.decode(self._tokenizer.byte_level_bytes(token)) if token else ""

    def finish(self) -> str:
        """What is still held back: half a character at the end, shown as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For all other vocabularies: decode a short window of ids with and without the new ones.

    A token's text may depend on what stands before it (a leading space, a run of byte tokens), so the window
    starts at tokens already shown; at first those are the end of the prompt, ``context_ids``.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = [
            token_id for token_id in context_ids[-CONTEXT_TOKENS:] if token_id not in tokenizer.special_ids
        ]
        while tail and self._is_byte(tail[0]):  # the window must not start inside a run of bytes
            del tail[0]
        self._window = [] if tail and self._is_byte(tail[-1]) else tail
        self._shown = tokenizer.decode(self._window)  # text of the window that is out already
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        if token_id in self._tokenizer.special_ids or self._tokenizer.token(token_id) is None:
            return ""
        self._new.append(token_id)
        # Bytes after this one may still change what it means; the library decodes a run of them as a whole.
        return "" if self._is_byte(token_id) else self._show(hold=True)

    def finish(self) -> str:
        """What is still held back."""
        return self._show(hold=False)

    def _show(self, *, hold: bool) -> str:
        text = self._tokenizer.decode(self._window + self._new)
        if not text.startswith(self._shown) or (hold and text.endswith("\ufffd")):
            return ""
        fresh = text[len(self._shown) :]
        if self._new:
            # Keep one token that is no byte, so that the next window starts where decoding may start.
            self._window = self._window_after()
            self._new = []
            self._shown = self._tokenizer.decode(self._window)
        return fresh

    def _window_after(self) -> list[int]:
        ids = self._window + self._new
        start = len(ids) - 1
        while start > 0 and self._is_byte(ids[start]):
            start -= 1
        return ids[start:]

    def _is_byte(self, token_id: int) -> bool:
        return BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or "") is not None


Detokenizer = ByteDetokenizer | WindowDetokenizer


def detokenizer_for(tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> Detokenizer:
    """The detokenizer of one answer that continues ``context_ids``."""
    return ByteDetokenizer(tokenizer) if tokenizer.byte_level else WindowDetokenizer(tokenizer, context_ids)


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and cuts at the first one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Returns (text that may be shown, the stop string found or None). After a stop push no more.

        Without ``may_stop`` no stop string ends in ``text``, but one may begin there.
        """
        if not self._stops:
            return text, None
        num_old = len(self._held)
        self._held += text
        if may_stop:
            # The one that was complete first, of several the longest: the same however the text was cut up.
            starts = ((stop, self._held.find(stop, max(0, num_old + 1 - len(stop)))) for stop in self._stops)
            found = [(at + len(stop), at, stop) for stop, at in starts if at >= 0]
            if found:
                end, at, stop = min(found)
                return self._held[: end if self._include_stop else at], stop
        num_held = max(_overlap(self._held, stop) for stop in self._stops)
        shown = len(self._held) - num_held
        text, self._held = self._held[:shown], self._held[shown:]
        return text, None

    def finish(self) -> str:
        """What is still held back, for an answer that ends in another way."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, shorter than ``stop``."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
