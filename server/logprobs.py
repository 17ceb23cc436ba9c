"""Log-probabilities in OpenAI's two shapes. JSON has no infinity, so the least value is -9999.0."""

import codecs
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_runtime.engine import TokenLogprob, TopLogprob

FLOOR = -9999.0


class HasText(Protocol):
    """A token as text and as bytes: all token classes of the engine, and Piece."""

    @property
    def text(self) -> str: ...
    @property
    def bytes(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of which only the text is known."""

    text: str
    bytes: bytes


def finite(logprob: float) -> float:
    """``logprob``, or FLOOR where it is lower or not a number."""
    return FLOOR if math.isnan(logprob) else max(logprob, FLOOR)


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """``choices[].logprobs.content`` of the chat endpoint."""
    return [
        _chat_token(token) | {"top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens
    ]


def _chat_token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": finite(token.logprob)}


def token_key(token: HasText) -> str:
    """A token as a dictionary key: half characters by their bytes, as two of them would look the same."""
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


class CompletionLogprobs:
    """``choices[].logprobs`` of the completions endpoint, which says where in the text each token begins.

    Special tokens are tokens without text, unless the echoed prompt spells them.
    """

    def __init__(self, special_ids: Collection[int]) -> None:
        self._special_ids = special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(
        self,
        echo: str,
        token_ids: Sequence[int],
        pieces: Sequence[Piece],
        tokens: Sequence[TokenLogprob | None],
    ) -> dict[str, Any]:
        """The echoed prompt. All four are aligned; ``tokens`` has None where nothing predicts one."""
        offsets = []
        for token_id, piece in zip(token_ids, pieces, strict=True):
            offsets.append(self._offset)
            text = self._decoder.decode(piece.bytes)
            if token_id in self._special_ids and not echo.startswith(text, self._offset):
                continue  # a begin token that the client did not write
            if text.startswith(" ") and not echo.startswith(" ", self._offset):
                text = text[1:]  # many vocabularies put a space before the first word
            self._offset = min(self._offset + len(text), len(echo))
        self._offset = len(echo)
        self._decoder.reset()
        return _completion_logprobs(pieces, tokens, offsets)

    def answer(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens of the answer."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            if token.token_id not in self._special_ids:
                self._offset += len(self._decoder.decode(token.bytes))
        return _completion_logprobs(tokens, tokens, offsets)


def _completion_logprobs(
    pieces: Sequence[HasText], tokens: Sequence[TokenLogprob | None], offsets: list[int]
) -> dict[str, Any]:
    return {
        "tokens": [token_key(piece) for piece in pieces],
        "token_logprobs": [None if token is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [None if token is None else _top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float]:
    """The best alternatives and, as OpenAI does, the chosen token."""
    alternatives: tuple[TokenLogprob | TopLogprob, ...] = (*token.top, token)
    return {token_key(top): finite(top.logprob) for top in alternatives}
