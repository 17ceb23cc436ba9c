"""SamplingParams: what a request may ask of sampling, each value in its range."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moe_runtime.errors import RequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
SEED_RANGE = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises RequestError, with ``param`` set, for any value out of range.

    temperature        0 is greedy (ties to the lowest token id); above, logits are divided by it
    top_p, min_p       keep the smallest set of tokens with mass top_p; drop those below min_p * the best
    top_k              keep the k best (and those equal to the k-th); 0 or -1 keeps all
    presence_penalty, frequency_penalty   subtracted once, or per occurrence, for tokens of the answer
    repetition_penalty divides positive and multiplies negative logits of tokens seen in prompt or answer
    logit_bias         token id -> added to its logit
    seed               same seed, same request: same text, in any batch; None draws one
    stop, stop_token_ids   strings and ids that end the answer; their text is left out unless include_stop
    max_tokens         None: the rest of the context; 0: only look at the prompt
    min_tokens         none of the first min_tokens tokens ends the answer; a stop string may begin in them
    n                  independent choices
    logprobs           None: off; k: each token's log-probability and the k best alternatives
    prompt_logprobs    the same for the tokens of the prompt
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, math.inf)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, -1, math.inf)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        for token_id, bias in self.logit_bias.items():
            _check_range("logit_bias", bias, -100.0, 100.0)
            _check_range("logit_bias", token_id, 0, math.inf)
        if self.seed is not None:
            _check_range("seed", self.seed, *SEED_RANGE)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 0, math.inf)
            _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("min_tokens", self.min_tokens, 0, math.inf)
        _check_range("n", self.n, 1, MAX_CHOICES)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("stop", "stop_token_ids"):
            if len(getattr(self, name)) > MAX_STOPS:
                raise RequestError(
                    f"{name} has {len(getattr(self, name))} entries, the limit is {MAX_STOPS}", param=name
                )
        if "" in self.stop:
            raise RequestError("stop must not hold an empty string", param="stop")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = low < value <= high if low_open else low <= value <= high
    if not inside or value == math.inf:  # NaN fails every comparison
        bound = f"{'above' if low_open else 'at least'} {low}" + (
            f" and at most {high}" if high < math.inf else ""
        )
        raise RequestError(f"{name} must be a finite number, {bound}, got {value}", param=name)
