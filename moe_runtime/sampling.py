"""The choice of one token from one row of logits as a list of small filters.

The sampler sees one row and that sequence's own tokens, nothing of the batch; randomness is a function of
(seed, choice, position). So a sequence draws the same tokens alone, in any batch and after preemption.
It knows no torch: rows are numpy float32 vectors of V logits.
"""

import math
import os
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.errors import RequestFailed
from moe_runtime.sampling_params import MAX_LOGPROBS, SamplingParams

__all__ = [
    "MAX_LOGPROBS",
    "History",
    "Logits",
    "SamplingParams",
    "best_tokens",
    "check_finite",
    "choose_token",
    "draw_seed",
    "log_softmax",
    "sample",
]

Logits = npt.NDArray[np.float32]
Row = npt.NDArray[Any]  # float32 while sampling, float64 for logprobs
Ids = npt.NDArray[np.intp]
Chooser = Callable[[Row, float, float, int, float, float], int]  # as choose_token

DISTANCES = (4.0, 8.0, 16.0)  # from the best logit: where the tokens that matter are
MIN_TEMPERATURE = 1e-30  # below, all but the best are at -inf anyway
MAX_TEMPERATURE = 1e30  # above, all are as likely; and a float32 still holds it

# Why a row gives no token.
NOT_FINITE = "the model computed logits that are not finite numbers for this request"
NOTHING_LEFT = "penalties, logit_bias and min_tokens leave no token to choose"


class Occurrences:
    """Distinct ids and how often each came, as arrays that grow with every ``add``."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._ids, self._counts = np.unique(np.asarray(token_ids, dtype=np.intp), return_counts=True)
        self._places = {token_id: place for place, token_id in enumerate(self._ids.tolist())}

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Ids:
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(place + 16, dtype=np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros(place + 16, dtype=np.intp)])
        self._ids[place] = token_id
        self._counts[place] += 1


class History:
    """What the filters may know of one choice: only what ``params`` asks for is kept, token by token, so that
    a token costs the same after a long prompt or answer as after a short one.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int] = (), end_ids: Collection[int] = ()
    ) -> None:
        """``end_ids`` must not be chosen for the first ``params.min_tokens`` tokens."""
        self.num_output = 0
        self.seen = Occurrences(prompt_ids) if params.repetition_penalty != 1.0 else None
        counting = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self.output = Occurrences() if counting else None
        self.bias_ids = np.asarray(list(params.logit_bias), dtype=np.intp)
        self.bias = np.asarray(list(params.logit_bias.values()), dtype=np.float32)
        self.end_ids = np.asarray(sorted(end_ids), dtype=np.intp)

    def add(self, token_id: int) -> None:
        """The answer goes on with ``token_id``."""
        self.num_output += 1
        for occurrences in (self.seen, self.output):
            if occurrences is not None:
                occurrences.add(token_id)


def sample(
    logits: Logits,
    params: SamplingParams,
    history: History,
    seed: int,
    choice: int,
    chooser: Chooser | None = None,
) -> int:
    """Choose one token id from ``logits`` (V,), which is left unchanged.

    ``chooser`` makes the draw: ``choose_token``, the literal one, unless the engine has a faster.
    Raises RequestFailed when a logit is NaN or infinite, or when the filters leave nothing to choose.
    """
    check_finite(logits)
    row = logits.copy()
    with np.errstate(over="ignore"):  # overflow means -inf, the right answer, or +inf, which is caught
        for adjust in ADJUSTMENTS:
            row = adjust(row, params, history)
        if not np.isfinite(row.max()):
            raise RequestFailed(NOTHING_LEFT)
        if params.greedy:
            return int(np.argmax(row))  # the first of equal ones: the lowest id
        fraction = uniform(seed, choice, history.num_output)
        temperature = divisor(params)
        choose = chooser or choose_token
        return choose(row, temperature, params.min_p, params.top_k, params.top_p, fraction)


def divisor(params: SamplingParams) -> float:
    """The temperature of a draw, within what float32 can divide by."""
    return min(max(params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def choose_token(
    row: Row, temperature: float, min_p: float, top_k: int, top_p: float, fraction: float
) -> int:
    """The token at ``fraction`` in [0, 1) of what the filters leave of softmax(row / temperature)."""
    row = apply_temperature(row, temperature)
    row = keep_min_p(row, min_p)
    row = keep_top_k(row, top_k)
    row = keep_top_p(row, top_p)
    return draw(row, fraction)


def check_finite(logits: Logits) -> None:
    """Raise RequestFailed when ``logits`` (any shape) holds NaN or infinity."""
    # Either makes an extreme that is not finite.
    if logits.size and not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
        raise RequestFailed(NOT_FINITE)


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
    if history.seen is not None:
        values = row[history.seen.ids]
        row[history.seen.ids] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    return row


def apply_count_penalties(row: Row, params: SamplingParams, history: History) -> Row:
    """Subtract presence_penalty once and frequency_penalty per occurrence, of tokens in the answer only."""
    if history.output is not None:
        penalties = params.presence_penalty + params.frequency_penalty * history.output.counts
        row[history.output.ids] -= penalties
    return row


def apply_logit_bias(row: Row, params: SamplingParams, history: History) -> Row:
    """Add the request's bias."""
    row[history.bias_ids] += history.bias
    return row


def mask_end_ids(row: Row, params: SamplingParams, history: History) -> Row:
    """Remove the ids that would end the answer before min_tokens."""
    if history.num_output < params.min_tokens:
        row[history.end_ids] = -np.inf
    return row


def apply_temperature(row: Row, temperature: float) -> Row:
    """Divide the distances to the best logit, so that the best stays 0 however small the temperature."""
    return (row - row.max()) / temperature


def keep_min_p(row: Row, min_p: float) -> Row:
    """Keep tokens whose probability is at least min_p times that of the best."""
    if min_p > 0.0:
        row = np.where(row >= row.max() + math.log(min_p), row, -np.inf)
    return row


def keep_top_k(row: Row, top_k: int) -> Row:
    """Keep the top_k best tokens and every token equal to the last of them."""
    if 0 < top_k < len(row):
        candidates = _near_best(row, lambda ids: len(ids) >= top_k)
        values = row[candidates]
        if top_k <= len(values):
            row = _only(row, candidates[values >= np.partition(values, -top_k)[-top_k]])
    return row


def keep_top_p(row: Row, top_p: float) -> Row:
    """Keep the smallest set of most likely tokens whose mass reaches top_p; of equal ones, low ids first."""
    if top_p < 1.0:
        weights = np.exp(row - row.max())
        wanted = top_p * weights.sum(dtype=np.float64)
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


# In the order they apply. To add an adjustment, write the function and name it here; a filter of the draw
# belongs into choose_token and its fast forms, csrc/sampling.cpp and kernels/triton/sampling.py, which has
# the adjustments too.
ADJUSTMENTS: tuple[Callable[[Row, SamplingParams, History], Row], ...] = (
    apply_repetition_penalty,
    apply_count_penalties,
    apply_logit_bias,
    mask_end_ids,
)
