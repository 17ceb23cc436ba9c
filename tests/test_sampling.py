"""Each filter against its formula, the draw against its distribution, and the limits of SamplingParams."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import sampling
from moe_runtime.errors import RequestError, RequestFailed
from moe_runtime.sampling import History, SamplingParams, best_tokens, log_softmax, sample, uniform

ROWS = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12).map(np.float64)


def history(
    params: SamplingParams,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    end_ids: Sequence[int] = (),
) -> History:
    result = History(params, prompt, end_ids)
    for token_id in answer:
        result.add(token_id)
    return result


def choose(logits: Any, params: SamplingParams, seed: int = 0, **known: Sequence[int]) -> int:
    return sample(logits, params, history(params, **known), seed=seed, choice=0)


def softmax(row: Any) -> Any:
    weights = [math.exp(value - max(row)) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def kept(row: Any) -> set[int]:
    return {int(i) for i in np.flatnonzero(np.isfinite(row))}


@given(row=ROWS, top_k=st.integers(-1, 14))
@settings(derandomize=True, deadline=None)
def test_top_k_keeps_the_k_best_and_their_equals(row: Any, top_k: int) -> None:
    bound = sorted(row)[-top_k] if 0 < top_k < len(row) else -math.inf
    assert kept(sampling.keep_top_k(row, top_k)) == {i for i, value in enumerate(row) if value >= bound}


@given(row=ROWS, top_p=st.floats(0.01, 1.0))
@settings(derandomize=True, deadline=None)
def test_top_p_keeps_the_smallest_set_with_that_mass(row: Any, top_p: float) -> None:
    result = kept(sampling.keep_top_p(row, top_p))
    probabilities = softmax(row)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert result == set(order[: len(result)])
    assert math.fsum(probabilities[i] for i in result) >= top_p - 1e-12
    assert math.fsum(probabilities[i] for i in order[: len(result) - 1]) < top_p + 1e-12


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999, 1 - 1e-16])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(top_p: float, scale: float) -> None:
    row = np.round(np.random.default_rng(1).normal(0, scale, 20_000), 2)  # rounded, so that many are equal
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(np.exp(row[order] - row.max()))
    num_kept = np.searchsorted(mass, top_p * mass[-1] * (1 - 1e-12)) + 1
    result = kept(sampling.keep_top_p(row, top_p))
    assert abs(len(result) - num_kept) <= 1 and result == set(order[: len(result)].tolist())


@given(row=ROWS, min_p=st.floats(0.0, 1.0))
@settings(derandomize=True, deadline=None)
def test_min_p_drops_what_is_unlikely_beside_the_best(row: Any, min_p: float) -> None:
    result = kept(sampling.keep_min_p(row, min_p))
    probabilities = softmax(row)
    clearly_in = {i for i, p in enumerate(probabilities) if p > min_p * max(probabilities) * (1 + 1e-12)}
    clearly_out = {i for i, p in enumerate(probabilities) if p < min_p * max(probabilities) * (1 - 1e-12)}
    assert clearly_in <= result and not clearly_out & result and int(np.argmax(row)) in result


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    row = np.array([2.0, -2.0, 3.0, 1.0])
    params = SamplingParams(repetition_penalty=2.0)
    result = sampling.apply_repetition_penalty(row, params, history(params, [0, 0], [1]))
    assert result.tolist() == [1.0, -4.0, 3.0, 1.0]


def test_presence_counts_once_and_frequency_each_time_in_the_answer_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    result = sampling.apply_count_penalties(np.zeros(4), params, history(params, [3], [1, 1, 2]))
    assert result.tolist() == [0.0, -1.0, -0.75, 0.0]


def test_logit_bias_is_added_and_end_tokens_are_removed_until_min_tokens() -> None:
    params = SamplingParams(logit_bias={1: 2.5}, min_tokens=2)
    row = sampling.apply_logit_bias(np.zeros(3), params, history(params))
    early, late = history(params, answer=[0], end_ids=[2]), history(params, answer=[0, 0], end_ids=[2])
    assert sampling.mask_end_ids(row.copy(), params, early).tolist() == [0.0, 2.5, -math.inf]
    assert sampling.mask_end_ids(row.copy(), params, late).tolist() == [0.0, 2.5, 0.0]


IDS = st.lists(st.integers(0, 60), max_size=80)


@given(prompt=IDS, answer=IDS)
@settings(derandomize=True, deadline=None)
def test_counting_token_by_token_is_counting_at_once(prompt: list[int], answer: list[int]) -> None:
    known = history(SamplingParams(repetition_penalty=2, presence_penalty=1), prompt, answer)
    for occurrences, ids in ((known.seen, prompt + answer), (known.output, answer)):
        assert occurrences is not None
        counts = dict(zip(occurrences.ids.tolist(), occurrences.counts.tolist(), strict=True))
        assert counts == Counter(ids)


class CountedReads(Mapping[int, float]):
    """A logit_bias that notes how often it was looked into."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values_ = values
        self.reads = 0

    def __getitem__(self, token_id: int) -> float:
        self.reads += 1
        return self.values_[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def test_logit_bias_is_read_once_however_many_tokens_are_sampled() -> None:
    bias = CountedReads({token_id: 0.5 for token_id in range(300)})
    params = SamplingParams(logit_bias=bias)
    known = History(params)
    reads = bias.reads
    for position in range(20):
        known.add(sample(np.zeros(400, dtype=np.float32), params, known, seed=position, choice=0))
    assert bias.reads == reads


@given(row=ROWS, temperature=st.floats(1e-6, 100.0))
@settings(derandomize=True, deadline=None)
def test_temperature_divides_the_logits(row: Any, temperature: float) -> None:
    result = sampling.apply_temperature(row, max(temperature, sampling.MIN_TEMPERATURE))
    expected = [(value - max(row)) / temperature for value in row]
    np.testing.assert_allclose(result, expected, rtol=1e-15)


def test_the_largest_temperature_makes_all_allowed_tokens_equally_likely() -> None:
    params = SamplingParams(temperature=1e300, min_tokens=1)
    logits = np.asarray([5, 0, 9, -9, 30, 2], dtype=np.float32)
    drawn = [choose(logits, params, seed, end_ids=[0, 3, 4]) for seed in range(60)]
    assert set(drawn) == {1, 2, 5} and min(Counter(drawn).values()) >= 10


def test_the_smallest_temperature_is_greedy_among_unequal_tokens() -> None:
    logits = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    for temperature in (0.0, 5e-324, 1e-300):
        assert choose(logits, SamplingParams(temperature=temperature)) == 1


def test_greedy_takes_the_lowest_id_of_equal_tokens() -> None:
    logits = np.array([0.0, 5.0, 5.0], dtype=np.float32)
    assert choose(logits, SamplingParams(temperature=0.0)) == 1


def test_the_logits_of_the_model_are_left_unchanged() -> None:
    logits = np.arange(5, dtype=np.float32)
    params = SamplingParams(repetition_penalty=2, presence_penalty=1, logit_bias={0: 9}, top_p=0.5, top_k=2)
    params = dataclasses.replace(params, min_tokens=2)
    choose(logits, params, prompt=[1], answer=[2], end_ids=[3])
    assert logits.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [1.0, 2.0, 4.0, 8.0, 1.0]),
        (SamplingParams(temperature=0.5), [1.0, 4.0, 16.0, 64.0, 1.0]),
        (SamplingParams(top_k=2), [0.0, 0.0, 4.0, 8.0, 0.0]),
        (SamplingParams(top_p=0.8), [0.0, 2.0, 4.0, 8.0, 0.0]),
        (SamplingParams(min_p=0.3, logit_bias={0: math.log(8)}), [8.0, 0.0, 4.0, 8.0, 0.0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p and bias"],
)
def test_draws_follow_the_distribution(params: SamplingParams, expected: list[float]) -> None:
    logits = np.log(np.array([1.0, 2.0, 4.0, 8.0, 1.0])).astype(np.float32)
    num_draws = 20_000
    counts = np.zeros(5)
    for seed in range(num_draws):
        counts[choose(logits, params, seed)] += 1
    wanted = np.array(expected) / sum(expected) * num_draws
    assert counts[wanted == 0].sum() == 0
    chi_square = ((counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    # 99.99 % quantiles for 0 to 4 degrees of freedom; the seeds are fixed, so this never flakes.
    assert chi_square < [0.0, 15.1, 18.4, 21.1, 23.5][int((wanted > 0).sum()) - 1]


def test_random_numbers_depend_on_seed_choice_and_position_alone() -> None:
    places = [
        (seed, choice, position)
        for seed in (-(2**63), -1, 0, 2**63 - 1)
        for choice in (0, 1)
        for position in (0, 1)
    ]
    numbers = {place: uniform(*place) for place in places}
    assert len(set(numbers.values())) == len(places)
    assert all(uniform(*place) == number and 0 <= number < 1 for place, number in numbers.items())


def test_uniform_numbers_are_uniform() -> None:
    counts, _ = np.histogram([uniform(5, 0, position) for position in range(20_000)], bins=20, range=(0, 1))
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 50.8  # 99.99 % quantile, 19 degrees of freedom


def test_a_draw_at_either_end_of_the_mass_is_a_token_with_mass() -> None:
    row = np.array([-math.inf, 0.0, 0.0, -math.inf])
    assert [sampling.draw(row, fraction) for fraction in (0.0, 0.4999, 0.5, 1 - 2**-53, 1.0)] == [
        1,
        1,
        2,
        2,
        2,
    ]


@given(row=ROWS, count=st.integers(0, 14))
@settings(derandomize=True, deadline=None)
def test_best_tokens_are_sorted_by_likelihood_then_id(row: Any, count: int) -> None:
    assert best_tokens(row, count) == sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]


def test_log_softmax_is_normalised_even_for_large_logits() -> None:
    row = log_softmax(np.array([1e4, 1e4 - 1, -1e4], dtype=np.float32))
    np.testing.assert_allclose(np.exp(row).sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(row[0] - row[1], 1.0, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_fail_the_request(bad: float) -> None:
    logits = np.array([0.0, bad], dtype=np.float32)
    with pytest.raises(RequestFailed, match="not finite"):
        choose(logits, SamplingParams(temperature=0.0))


def test_banning_every_token_fails_the_request() -> None:
    with pytest.raises(RequestFailed, match="leave no token"):
        choose(np.zeros(2, dtype=np.float32), SamplingParams(min_tokens=1), end_ids=[0, 1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0),
        ("top_p", 1.01), ("top_p", math.nan), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.5),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf), ("logit_bias", {1: 101.0}), ("logit_bias", {-1: 1.0}),
        ("seed", 2**63), ("seed", -(2**63) - 1), ("max_tokens", -1), ("min_tokens", -1), ("n", 0), ("n", 129),
        ("logprobs", 21), ("prompt_logprobs", -1), ("stop", ("",)), ("stop", ("x",) * 17),
        ("stop_token_ids", (1,) * 17),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_penalties_that_overflow_fail_the_request() -> None:
    logits = np.array([1e20, 1.0], dtype=np.float32)
    with pytest.raises(RequestFailed, match="leave no token"):
        choose(logits, SamplingParams(repetition_penalty=1e-30), prompt=[0])


def test_limits_themselves_are_allowed() -> None:
    SamplingParams(temperature=0.0, top_p=1.0, top_k=10**400, min_p=1.0, seed=-(2**63), max_tokens=0, n=128)
