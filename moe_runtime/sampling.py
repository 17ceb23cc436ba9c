"""SamplingParams, and the choice of one token from one row of logits as a list of small filters.

The sampler sees one row and that sequence's own tokens, nothing of the batch; randomness is a function of
(seed, choice, position). So a sequence draws the same tokens alone, in any batch and after preemption.
It knows no torch: rows are numpy float32 vectors of V logits.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.errors import RequestError, RequestFailed

Logits = npt.NDArray[np.float32]
Row = npt.NDArray[Any]  # float32 while sampling, float64 for logprobs
Ids = npt.NDArray[np.intp]

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
DISTANCES = (4.0, 8.0, 16.0)  # from the best logit: where the tokens that matter are
MIN_TEMPERATURE = 1e-30  # below, all but the best are at -inf anyway
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


@dataclass(frozen=True, slots=True)
class History:
    """What the filters may know of one sequence: its tokens, and the ids that would end it too early."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    banned_ids: Collection[int] = ()


def sample(logits: Logits, params: SamplingParams, history: History, seed: int, choice: int) -> int:
    """Choose one token id from ``logits`` (V,), which is left unchanged.

    Raises RequestFailed when a logit is NaN or infinite, or when the filters leave nothing to choose.
    """
    check_finite(logits)
    row = logits.copy()
    with np.errstate(over="ignore"):  # overflow means -inf, the right answer, or +inf, which is caught
        for adjust in ADJUSTMENTS:
            row = adjust(row, params, history)
        if not np.isfinite(row.max()):
            raise RequestFailed("penalties, logit_bias and min_tokens leave no token to choose")
        if params.greedy:
            return int(np.argmax(row))  # the first of equal ones: the lowest id
        row = apply_temperature(row, params)
        for keep in FILTERS:
            row = keep(row, params)
    return draw(row, uniform(seed, choice, len(history.output_ids)))


def check_finite(logits: Logits) -> None:
    """Raise RequestFailed when ``logits`` (any shape) holds NaN or infinity."""
    if not np.isfinite(logits).all():
        raise RequestFailed("the model computed logits that are not finite numbers for this request")


def draw_seed() -> int:
    """A seed for a request that gave none, from the operating system."""
    return int.from_bytes(os.urandom(8), "little", signed=True)


def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in [0, 1) of this place: a keyed counter, so no state can be lost or shared."""
    place = b"".join(number.to_bytes(8, "little", signed=True) for number in (seed, choice, position))
    return (int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(row: Row, fraction: float) -> int:
    """The token at ``fraction`` in [0, 1) of the probability mass of softmax(row), ids in ascending order."""
    ids = np.flatnonzero(row > -np.inf)
    mass = np.cumsum(np.exp(row[ids] - row.max()).astype(np.float64))
    place = int(np.searchsorted(mass, fraction * mass[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])  # the product may round up to all the mass


def log_softmax(logits: Logits) -> Row:
    """log_softmax over the last axis in float64, of logits nothing has touched: what logprobs report."""
    row: Row = logits.astype(np.float64)
    row -= row.max(axis=-1, keepdims=True)
    row -= np.log(np.exp(row).sum(axis=-1, keepdims=True))
    return row


def best_tokens(logprobs: Row, count: int) -> list[int]:
    """Ids of the ``count`` largest entries of ``logprobs`` (V,), largest first, equal ones by id."""
    if count <= 0:
        return []
    # Ascending ids, so that the stable sort breaks ties by id.
    candidates = _near_best(logprobs, lambda ids: len(ids) >= count)
    order = np.argsort(-logprobs[candidates], kind="stable")
    return [int(token_id) for token_id in candidates[order[:count]]]


def apply_repetition_penalty(row: Row, params: SamplingParams, history: History) -> Row:
    """Divide positive, multiply negative logits of every token seen in the prompt or the answer."""
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*history.prompt_ids, *history.output_ids], dtype=np.int64))
        values = row[seen]
        row[seen] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    return row


def apply_count_penalties(row: Row, params: SamplingParams, history: History) -> Row:
    """Subtract presence_penalty once and frequency_penalty per occurrence, of tokens in the answer only."""
    if (params.presence_penalty or params.frequency_penalty) and history.output_ids:
        seen, counts = np.unique(np.asarray(history.output_ids, dtype=np.int64), return_counts=True)
        row[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return row


def apply_logit_bias(row: Row, params: SamplingParams, history: History) -> Row:
    """Add the request's bias, token by token."""
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    return row


def mask_banned(row: Row, params: SamplingParams, history: History) -> Row:
    """Remove the ids that would end the answer before min_tokens."""
    if history.banned_ids:
        row[np.asarray(list(history.banned_ids), dtype=np.int64)] = -np.inf
    return row


def apply_temperature(row: Row, params: SamplingParams) -> Row:
    """Divide the distances to the best logit, so that the best stays 0 however small the temperature."""
    return (row - row.max()) / max(params.temperature, MIN_TEMPERATURE)


def keep_min_p(row: Row, params: SamplingParams) -> Row:
    """Keep tokens whose probability is at least min_p times that of the best."""
    if params.min_p > 0.0:
        row = np.where(row >= row.max() + math.log(params.min_p), row, -np.inf)
    return row


def keep_top_k(row: Row, params: SamplingParams) -> Row:
    """Keep the top_k best tokens and every token equal to the last of them."""
    if 0 < params.top_k < len(row):
        candidates = _near_best(row, lambda ids: len(ids) >= params.top_k)
        values = row[candidates]
        if params.top_k <= len(values):
            row = _only(row, candidates[values >= np.partition(values, -params.top_k)[-params.top_k]])
    return row


def keep_top_p(row: Row, params: SamplingParams) -> Row:
    """Keep the smallest set of most likely tokens whose mass reaches top_p; of equal ones, low ids first."""
    if params.top_p < 1.0:
        weights = np.exp(row - row.max())
        wanted = params.top_p * weights.sum(dtype=np.float64)
        candidates = _near_best(row, lambda ids: weights[ids].sum(dtype=np.float64) >= wanted)
        order = candidates[np.argsort(-row[candidates], kind="stable")]
        mass = np.cumsum(weights[order].astype(np.float64))
        row = _only(row, order[: int(np.searchsorted(mass, wanted, side="left")) + 1])
    return row


def _near_best(row: Row, enough: Callable[[Ids], bool]) -> Ids:
    """Ids, ascending, of the best tokens: sure to hold ``enough``, or all that have any probability.

    Sorting a whole vocabulary takes longer than everything else a step does in Python; few tokens matter.
    """
    best = row.max()
    for distance in DISTANCES:
        ids = np.flatnonzero(row >= best - distance)
        if enough(ids):
            return ids
    return np.flatnonzero(row > -np.inf)


def _only(row: Row, ids: Ids) -> Row:
    """``row`` with everything but ``ids`` removed."""
    kept = np.full_like(row, -np.inf)
    kept[ids] = row[ids]
    return kept


# In the order they apply. To add a filter, write the function and name it here.
ADJUSTMENTS: tuple[Callable[[Row, SamplingParams, History], Row], ...] = (
    apply_repetition_penalty,
    apply_count_penalties,
    apply_logit_bias,
    mask_banned,
)
FILTERS: tuple[Callable[[Row, SamplingParams], Row], ...] = (keep_min_p, keep_top_k, keep_top_p)
