"""What the engine says while it generates: plain frozen data, no behaviour, no torch."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position. ``text`` may show a replacement character where ``bytes`` is exact."""

    token_id: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token and the best alternatives, most likely first, equal ones by id.

    Log-probabilities are the model's own: log_softmax of its logits before temperature, penalties, bias or
    any filter. ``top`` has as many entries as the request asked for; the chosen token need not be in it.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one choice of a request.

    ``text`` is what may be shown now: empty while half a character or a possible stop string is held back.
    ``token_ids`` holds the token of this step (also an end token, whose text is not shown); it is empty in
    an event that only ends the choice. The last event of a choice is the one with a ``finish_reason``.
    ``stop_reason`` is the stop string or stop token id that ended it, None for the model's own end token.
    ``prompt_logprobs`` comes once, on the first event of choice 0, when asked for: one entry per prompt
    token, None for the first, which nothing predicts.
    """

    request_id: str
    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice: the events of ``Engine.generate`` put together."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment, then counters since the start. Tokens are counted once each, when computed."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # free to take, whether or not they still hold a reusable prefix
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # of admitted sequences, cached ones included
    computed_tokens: int = 0  # all tokens sent through the model, recomputation included
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    finished_stop: int = 0
    finished_length: int = 0
    finished_error: int = 0
    finished_abort: int = 0
