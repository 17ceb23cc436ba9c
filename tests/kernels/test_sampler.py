"""The draw in C++ against the literal one in sampling.py."""

import math

import numpy as np
import pytest

from moe_runtime import sampling
from moe_runtime.errors import KernelError
from moe_runtime.kernels import sampler

RULES = (  # temperature, min_p, top_k, top_p
    (1.0, 0.0, 0, 1.0),
    (0.7, 0.0, 0, 0.95),
    (0.7, 0.0, 20, 0.8),
    (1.3, 0.05, 0, 1.0),
    (1.0, 0.0, 5, 1.0),
    (2.5, 0.001, 50, 0.5),
    (1e-30, 0.0, 0, 1.0),
    (100.0, 0.0, 0, 0.999),
    (1.0, 0.3, 3, 0.3),
    (1.0, 0.0, -1, 1e-9),
)
SIZES = (1, 2, 7, 16, 255, 256, 257, 4099, 151_936)


def near_an_edge(row: np.ndarray, rules: tuple[float, float, int, float], fraction: float) -> bool:
    """Whether rounding may decide: the literal draw changes when the fraction or top_p moves a little."""
    temperature, min_p, top_k, top_p = rules
    around = {
        sampling.choose_token(row, temperature, min_p, top_k, p, min(max(fraction + shift, 0), 1 - 2**-53))
        for shift in (-1e-6, 0.0, 1e-6)
        for p in ({top_p * (1 - 1e-6), top_p, min(1.0, top_p * (1 + 1e-6))} if top_p < 1 else {1.0})
    }
    return len(around) > 1


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_token_is_that_of_the_literal_draw(
    isa: str, size: int, rules: tuple[float, float, int, float]
) -> None:
    generator = np.random.default_rng(size)
    compared = 0
    for scale in (0.0, 0.5, 4.0):
        row = (generator.standard_normal(size) * scale).astype(np.float32)
        for fraction in (0.0, 0.1, 0.5, 0.999, 1 - 2**-53):
            if not near_an_edge(row, rules, fraction):
                literal = sampling.choose_token(row, *rules, fraction)
                assert sampler.choose_token(row, *rules, fraction) == literal
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_equal_and_forbidden_tokens_are_treated_as_the_literal_draw_does(
    isa: str, rules: tuple[float, float, int, float]
) -> None:
    """Rounded values have many ties; adjustments leave -inf."""
    generator = np.random.default_rng(1)
    row = np.round(generator.standard_normal(3000) * 2).astype(np.float32)
    row[::3] = -np.inf
    for fraction in generator.random(40):
        if not near_an_edge(row, rules, fraction):
            token = sampler.choose_token(row, *rules, fraction)
            assert token == sampling.choose_token(row, *rules, fraction) and token % 3


def test_draws_follow_the_distribution(isa: str) -> None:
    row = np.log(np.asarray([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    drawn = [sampler.choose_token(row, 1.0, 0.0, 0, 1.0, (i + 0.5) / 1000) for i in range(1000)]
    assert [drawn.count(i) for i in range(4)] == [500, 250, 125, 125]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_finite_best_gives_no_token(isa: str, bad: float) -> None:
    assert sampler.choose_token(np.full(300, -np.inf, dtype=np.float32), 1.0, 0.0, 0, 1.0, 0.5) == -1
    for place in (0, 7, 256, 299):
        row = np.zeros(300, dtype=np.float32)
        row[place] = bad
        assert sampler.choose_token(row, 1.0, 0.0, 0, 1.0, 0.5) == -1
        assert sampler.choose_token(row, 1.0, 0.0, 5, 0.9, 0.5) == -1


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(KernelError, match=r"choose_token: row is float64 \[4\]"):
        sampler.choose_token(np.zeros(4), 1.0, 0.0, 0, 1.0, 0.5)
    with pytest.raises(KernelError, match="contiguous"):
        sampler.choose_token(np.zeros(8, dtype=np.float32)[::2], 1.0, 0.0, 0, 1.0, 0.5)
