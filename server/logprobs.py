"""Log-probabilities in OpenAI's two shapes. JSON has no infinity, so the least value is -9999.0."""

import codecs
import math
from collections.abc import Iterable, Sequence
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
    """``choices[].logprobs`` of the completions endpoint, which counts characters along the whole text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def render(self, tokens: Sequence[TokenLogprob | None], texts: Sequence[HasText]) -> dict[str, Any]:
        """``tokens`` and ``texts`` are aligned; ``tokens`` has None where nothing predicts one."""
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(text.bytes))
        return {
            "tokens": [token_key(text) for text in texts],
            "token_logprobs": [None if token is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token is None else _top(token) for token in tokens],
            "text_offset": offsets,
        }


def _top(token: TokenLogprob) -> dict[str, float]:
    """The best alternatives and, as OpenAI does, the chosen token."""
    alternatives: tuple[TokenLogprob | TopLogprob, ...] = (*token.top, token)
    return {token_key(top): finite(top.logprob) for top in alternatives}
