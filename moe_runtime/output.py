"""What the engine says while it generates: plain frozen data, no behaviour, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# "drift": the policy of its scenario (drift_policy.py) refused the request, before its first token.
FinishReason = Literal["stop", "length", "error", "abort", "drift"]


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
    ``lost_mass`` is known under a mask: the mean part of gate weight that it took away so far (lost_mass.py);
    in a choice's first event that of the prompt. ``drift`` is what the scenario's policy made of it: None,
    "flag", or "fallback" if all experts answer instead, and the lost mass is the scenario's.
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
    lost_mass: float | None = None
    drift: str | None = None
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
    lost_mass: float | None = None
    drift: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @classmethod
    def of(cls, events: Sequence[TokenEvent]) -> "Completion":
        """All that one choice said, from its events in order."""
        first, last = events[0], events[-1]
        logprobs = [logprob for event in events for logprob in event.logprobs or ()]
        return cls(
            choice=last.choice,
            text="".join(event.text for event in events),
            token_ids=tuple(token_id for event in events for token_id in event.token_ids),
            logprobs=tuple(logprobs) if any(event.logprobs is not None for event in events) else None,
            finish_reason=last.finish_reason or "error",
            stop_reason=last.stop_reason,
            error=last.error,
            num_prompt_tokens=last.num_prompt_tokens,
            num_cached_tokens=last.num_cached_tokens,
            lost_mass=last.lost_mass,
            drift=last.drift,
            prompt_logprobs=first.prompt_logprobs,
        )


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
    outside_mask: int = 0  # experts that a token was sent to although its mask forbids them: never
    finished_stop: int = 0
    finished_length: int = 0
    finished_error: int = 0
    finished_abort: int = 0
    finished_drift: int = 0
