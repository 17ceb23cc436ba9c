"""Tokens and log-probabilities chosen on the device, against the literal sampler in sampling.py."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from moe_runtime import sampling as literal_sampling  # noqa: E402
from moe_runtime.device_sampling import draws_on  # noqa: E402
from moe_runtime.errors import KernelError, RequestFailed  # noqa: E402
from moe_runtime.generation import Draw  # noqa: E402
from moe_runtime.kernels.draws import Draws, Number, Status  # noqa: E402
from moe_runtime.kernels.triton import logprobs, sampling  # noqa: E402
from moe_runtime.sampling import History, SamplingParams, best_tokens, log_softmax  # noqa: E402

SIZE = 77  # no multiple of a block
# What a GPU's exponentials and the order of sums may change, as part of all mass.
EDGE = 1e-6
# Of a log-probability: the float32 that carries it, and the mass, of which each part is off by some 2**-22.
ROUNDING = 2.0**-21


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small rows are several blocks, and more than can be set aside."""
    for module in (sampling, logprobs):
        monkeypatch.setattr(module, "SAMPLING_NEAR", 16)
        monkeypatch.setattr(module, "sampling_block", lambda vocabulary: 32)
    monkeypatch.setattr(sampling, "SAMPLING_LIST", 8)


def asks(
    seed: int = 0,
    *,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    **given: Any,
) -> Draw:
    params = SamplingParams(**given)
    history = History(params, prompt, end_ids)
    for token_id in answer:
        history.add(token_id)
    return Draw(params, history, seed, choice=0)


def run(device: torch.device, rows: Any, draws: Sequence[Draw]) -> Any:
    """What the device answers, int32 [R, width]."""
    logits = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(device)
    before = logits.clone()
    found = sampling.sample_rows(logits, draws_on(draws, logits.shape[1], device)).cpu().numpy()
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32)), "logits are left as they were"
    return found


def literal(row: Any, draw: Draw, shift: float = 0.0, stretch: float = 1.0) -> int:
    """The literal sampler's token, its fraction moved by ``shift`` and top_p multiplied by ``stretch``."""

    def choose(row: Any, temperature: float, min_p: float, top_k: int, top_p: float, fraction: float) -> int:
        top_p = min(top_p * stretch, 1.0) if top_p < 1.0 else 1.0
        fraction = min(max(fraction + shift, 0.0), 1 - 2**-53)
        return literal_sampling.choose_token(row, temperature, min_p, top_k, top_p, fraction)

    row = np.asarray(row, dtype=np.float32)
    return literal_sampling.sample(row, draw.params, draw.history, draw.seed, draw.choice, choose)


def assert_literal(device: torch.device, rows: Any, draws: Sequence[Draw], at_least: float = 0.9) -> None:
    """Equal tokens, but where rounding may decide, which is rarely."""
    found = run(device, rows, draws)
    assert found[:, 1].tolist() == [Status.OK] * len(draws)
    compared = 0
    for row, draw, token_id in zip(rows, draws, found[:, 0].tolist(), strict=True):
        around = {literal(row, draw, shift, 1 + shift) for shift in (-EDGE, 0.0, EDGE)}
        assert token_id in around, (token_id, around, draw.params)
        compared += len(around) == 1
    assert compared >= at_least * len(draws)


def random_rows(count: int, size: int = SIZE, seed: int = 0) -> Any:
    """Nearly flat, plain and steep ones, every other one rounded so that many logits are equal."""
    generator = np.random.default_rng(seed)
    scales = np.resize([0.1, 4.0, 1.0, 0.3], count)[:, None]
    rows = (generator.standard_normal((count, size)) * scales).astype(np.float32)
    rows[::2] = np.round(rows[::2] * 2) / 2
    return rows


RULES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 12, "min_p": 0.02},
    {"top_k": SIZE, "top_p": 0.5},
    {"top_k": 10**20, "min_p": 1e-300, "top_p": 0.999},
    {"min_p": 0.3, "top_k": 3, "top_p": 0.3},
    {"top_p": 1e-9},
    {"top_p": 5e-324},
    {"top_p": 1 - 2**-53},
    {"min_p": 1.0},
    {"temperature": 1e-40},
    {"temperature": 100.0, "top_p": 0.9},
    {"temperature": 1e300, "top_k": 40},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_token_is_that_of_the_literal_sampler(device: torch.device, rules: dict[str, Any]) -> None:
    assert_literal(device, random_rows(4), [asks(seed, **rules) for seed in range(4)], at_least=0.75)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64])
def test_rows_of_any_length(device: torch.device, size: int) -> None:
    rules = ({}, {"top_k": 3, "top_p": 0.7}, {"top_p": 0.7}, {"temperature": 0.0}, {"top_k": 1})
    assert_literal(device, random_rows(5, size), [asks(seed, **rule) for seed, rule in enumerate(rules)])


def test_of_equal_logits_the_greedy_token_is_the_lowest(device: torch.device) -> None:
    rows = np.zeros((4, SIZE), dtype=np.float32)
    rows[0, [40, 60]] = 2.0
    rows[1, [5, 37, 69]] = 3.0  # the same lane of three blocks
    rows[2, :50] = -0.0
    rows[3] = -3e38
    assert run(device, rows, [asks(temperature=0.0)] * 4)[:, 0].tolist() == [40, 5, 0, 0]


def test_zero_and_minus_zero_are_equal(device: torch.device) -> None:
    rows = np.full((4, SIZE), -9.0, dtype=np.float32)
    rows[:, 3:60:2], rows[:, 4:60:2] = 0.0, -0.0
    draws = [asks(seed, top_p=top_p) for seed, top_p in enumerate((1e-9, 0.3, 0.6, 1.0))]
    assert_literal(device, rows, draws, at_least=0.5)


def test_draws_follow_the_distribution(device: torch.device) -> None:
    row = np.log(np.asarray([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    draws = draws_on([asks()] * 40, 4, device)
    draws.numbers[:, Number.FRACTION] = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    tokens = sampling.sample_rows(torch.from_numpy(row).expand(40, 4).contiguous().to(device), draws)[:, 0]
    assert tokens.bincount(minlength=4).tolist() == [20, 10, 5, 5]


def test_a_fraction_that_ends_a_token_begins_the_next_one(device: torch.device) -> None:
    draws = draws_on([asks()] * 6, 64, device)
    expected = [0, 1, 31, 32, 33, 63]  # 32 is where a block begins
    draws.numbers[:, Number.FRACTION] = torch.tensor(expected, dtype=torch.float64) / 64
    assert sampling.sample_rows(torch.zeros(6, 64, device=device), draws)[:, 0].tolist() == expected


def test_the_last_token_with_any_mass_is_the_last_that_is_drawn(device: torch.device) -> None:
    rows = np.zeros((1, SIZE), dtype=np.float32)
    rows[0, 70:] = -1e30
    draws = draws_on([asks()], SIZE, device)
    draws.numbers[:, Number.FRACTION] = 1 - 2**-53
    assert sampling.sample_rows(torch.from_numpy(rows).to(device), draws)[0, 0] == 69


@pytest.mark.parametrize("rules", [{"top_p": 0.9}, {"top_k": 7}, {"top_k": 9, "top_p": 0.6}, {"min_p": 0.1}])
def test_where_it_searches_does_not_decide(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any]
) -> None:
    """Among the few that fit aside, among enough of them, in the whole row: ways to the same token."""
    rows, draws = random_rows(4, seed=1), [asks(seed, **rules) for seed in range(4)]
    found = []
    for near in (4, 40, 128):
        monkeypatch.setattr(sampling, "SAMPLING_NEAR", near)
        found.append(run(device, rows, draws)[:, 0].tolist())
    assert found[0] == found[1] == found[2]


# --- penalties, bias, forbidden tokens ----------------------------------------------------------------------

MANY = list(range(3, 60, 2)) * 2  # several times the tokens that a list holds side by side
ADJUSTMENTS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.7, "prompt": MANY},
    {"repetition_penalty": 0.4, "prompt": [1, 1, 2], "answer": [5, 76, 5]},
    {"presence_penalty": 1.5, "answer": MANY},
    {"frequency_penalty": 0.7, "answer": [4] * 5 + [9]},
    {"presence_penalty": -2.0, "frequency_penalty": -0.1, "prompt": [7], "answer": MANY},
    {"logit_bias": {0: 100.0, 1: -100.0, 76: 3.3}},
    {"logit_bias": {token_id: 5.0 + token_id / 7 for token_id in range(10, 40)}},
    {"min_tokens": 3, "end_ids": [*range(20, 70)], "answer": [1, 2]},
    {"min_tokens": 2, "end_ids": [*range(20, 70)], "answer": [1, 2]},
    {
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25, "min_tokens": 9,
        "logit_bias": {2: 50.0, 3: 2.0, 8: 4.0}, "end_ids": [2, 11], "prompt": [*range(0, 77, 3)],
        "answer": [2, 3, 3, 8],
    },
)  # fmt: skip


@pytest.mark.parametrize("adjustment", ADJUSTMENTS, ids=str)
def test_penalties_bias_and_forbidden_tokens(device: torch.device, adjustment: dict[str, Any]) -> None:
    rules: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"top_k": 9, "top_p": 0.9})
    draws = [asks(seed, **rule, **adjustment) for seed, rule in enumerate(rules)]
    assert_literal(device, random_rows(3, seed=2), draws, at_least=0.6)


def test_adjusted_logits_are_those_of_the_literal_sampler_to_the_bit(device: torch.device) -> None:
    """Bias brings two penalised tokens to 1.0, and one of them, by turns, a bit above, to it, a bit below."""
    draws, rows = [], np.full((12, 9), -50.0, dtype=np.float32)
    rows[:, [0, 3]] = np.random.default_rng(3).uniform(12, 40, (12, 2))
    for seed, row in enumerate(rows):
        penalties = {"repetition_penalty": 1.1 + seed / 50, "presence_penalty": 0.3, "frequency_penalty": 0.7}
        known = asks(prompt=[0, 3], answer=[0, 3, 3, 3], **penalties)
        adjusted = row.copy()
        for adjust in literal_sampling.ADJUSTMENTS:
            adjusted = adjust(adjusted, known.params, known.history)
        bits = (1, 0, -1)[seed % 3] * np.spacing(adjusted[0])
        bias = {0: float(1 - adjusted[0] + bits), 3: float(1 - adjusted[3])}
        draws.append(asks(temperature=0.0, logit_bias=bias, prompt=[0, 3], answer=[0, 3, 3, 3], **penalties))
    tokens = run(device, rows, draws)[:, 0].tolist()
    assert tokens == [literal(row, draw) for row, draw in zip(rows, draws, strict=True)] == [0, 0, 3] * 4


def test_ids_that_are_no_token_are_passed_over(device: torch.device) -> None:
    draws = draws_on([asks(temperature=0.0, logit_bias={3: 9.0, 5: 1.0})], SIZE, device)
    draws.entries[0] = SIZE
    logits = torch.zeros(1, SIZE, device=device)
    assert sampling.sample_rows(logits, draws)[0].tolist() == [5, Status.OK]
    draws.entries[0] = -1
    assert sampling.sample_rows(logits, draws)[0].tolist() == [5, Status.OK]


# --- rows that give no token --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rules"),
    [
        (math.nan, {"temperature": 0.0}),
        (math.nan, {"top_k": 5, "logprobs": 2}),
        (math.inf, {}),
        (-math.inf, {"top_p": 0.9}),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(
    device: torch.device, value: float, rules: dict[str, Any]
) -> None:
    rows = random_rows(5)
    draws = [asks(seed, min_tokens=1, end_ids=[33], **rules) for seed in range(5)]
    good = run(device, rows, draws)
    for row, place in ((1, 0), (2, 33), (4, 76)):  # also where it is forbidden
        rows[row, place] = value
        with pytest.raises(RequestFailed, match="not finite"):
            literal(rows[row], draws[row])
    found = run(device, rows, draws)
    bad = Status.NOT_FINITE
    assert found[:, :2].tolist() == [good[0, :2].tolist(), [0, bad], [0, bad], good[3, :2].tolist(), [0, bad]]
    assert np.array_equal(found[[0, 3]], good[[0, 3]])


def test_a_row_of_which_nothing_is_left_says_so(device: torch.device) -> None:
    rows = np.full((3, 9), 3e38, dtype=np.float32)
    draws = [
        asks(min_tokens=1, end_ids=range(9)),
        asks(repetition_penalty=1e-3, prompt=[4]),  # above the largest float32
        asks(temperature=0.0, repetition_penalty=1e-3, prompt=[4]),
    ]
    for row, draw in zip(rows, draws, strict=True):
        with pytest.raises(RequestFailed, match="no token to choose"):
            literal(row, draw)
    assert run(device, rows, draws).tolist() == [[0, Status.NOTHING_LEFT]] * 3


# --- log-probabilities --------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model(device: torch.device) -> None:
    """Before penalties and filters; likeliest first, of equals the lower id."""
    rows = random_rows(6, seed=4)
    rows[4] = 1.5  # nothing but equals: more than can be set aside
    rows[5] = np.round(rows[5] / 4)
    rows[3, [40, 41, 42]] = 9.0, 8.0, 7.0  # each the best of its lane
    counts = (None, 20, 0, 3, 20, 1)
    draws = [
        asks(seed, logprobs=count, presence_penalty=2.0, answer=[3, 5], top_k=4)
        for seed, count in enumerate(counts)
    ]
    found = run(device, rows, draws)
    assert found.shape == (6, 3 + 2 * 20)
    assert found[:, 0].tolist() == [literal(row, draw) for row, draw in zip(rows, draws, strict=True)]
    for row, count, numbers in zip(rows[1:], counts[1:], found[1:], strict=True):
        expected = log_softmax(row)
        values = numbers.view(np.float32).astype(np.float64)
        ids = numbers[3 : 3 + count].tolist()
        assert ids == best_tokens(expected, count)
        given, told = values[[2, *range(23, 23 + count)]], expected[[numbers[0], *ids]]
        print(f"off by {np.abs(given - told).max():.1e}")
        assert np.all(np.abs(given - told) <= ROUNDING * (1 + np.abs(told)))


@pytest.mark.parametrize("size", [1, 3, 20, 33])
def test_more_logprobs_than_tokens(device: torch.device, size: int) -> None:
    row = random_rows(1, size, seed=size)
    found = run(device, row, [asks(logprobs=20)])[0]
    best = best_tokens(log_softmax(row[0]), 20)
    assert found[3 : 3 + len(best)].tolist() == best


def test_nobody_pays_for_logprobs_that_nobody_wants(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "write_logprobs", None)
    assert run(device, random_rows(2), [asks(), asks()]).shape == (2, 2)


# --- company, arguments -------------------------------------------------------------------------------------


def test_a_row_gets_the_same_bits_alone_and_in_any_company(device: torch.device) -> None:
    rows = random_rows(5, seed=5)
    draws = [
        asks(seed, logprobs=4, **rule, **adjustment)
        for seed, (rule, adjustment) in enumerate(zip(RULES[:5], ADJUSTMENTS[4:9], strict=True))
    ]
    alone = [run(device, row[None], [draw]) for row, draw in zip(rows, draws, strict=True)]
    for part in (slice(0, 2), slice(1, 4), slice(1, 5), slice(0, 5)):
        assert np.array_equal(run(device, rows[part], draws[part]), np.concatenate(alone[part]))


def test_what_cannot_be_sampled_is_refused(device: torch.device) -> None:
    logits, draws = torch.zeros(2, 8, device=device), draws_on([asks(), asks()], 8, device)
    with pytest.raises(KernelError, match="sample_rows: logits is .*expected at least one token"):
        sampling.sample_rows(logits[:, :0], draws)
    with pytest.raises(KernelError, match="sample_rows: logits is torch.float64"):
        sampling.sample_rows(logits.double(), draws)
    with pytest.raises(KernelError, match="contiguous"):
        sampling.sample_rows(torch.zeros(2, 16, device=device)[:, ::2], draws)
    with pytest.raises(KernelError, match=r"sample_rows: numbers is .*expected torch.float64 \[1, 14\]"):
        sampling.sample_rows(logits[:1], draws)
    with pytest.raises(KernelError, match="sample_rows: entries is torch.int64"):
        sampling.sample_rows(logits, dataclasses.replace(draws, entries=draws.entries.long()))
    nobody = Draws(draws.numbers[:0], draws.entries, -1)
    assert sampling.sample_rows(logits[:0], nobody).shape == (0, 2)
