"""How near is each kernel to what this machine can do? `make bench`; ARGS="..." selects, ARGS="--help" lists.

Operation x format x shape x tokens x threads x instruction set. Every row also measures, right before and
after its kernel, how fast the same threads read memory and how fast the row's arithmetic runs out of
registers, and prints which part of that roofline it reaches. Weights rotate over at least 2 GB, so that
nothing is read from the cache. Operations are those the result needs: an activation of 16 bits that a
kernel multiplies as two times 8 still counts once.

--compare sets torch beside it, in alternating calls.
"""

import time
from collections.abc import Iterator
from typing import Any

import kernels_torch
import pytest
import torch
from kernels_cases import Case
from kernels_limits import Meter, best
from kernels_report import row
from kernels_workloads import BUILDERS, Call, WorkingSets

import moe_runtime._C as _C

SECONDS = 0.7  # of calls per row, and at least MIN_ROUNDS of them
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@pytest.fixture(scope="session")
def sets(pytestconfig: pytest.Config) -> WorkingSets:
    return WorkingSets(int(pytestconfig.getoption("working_set") * 1e9))


@pytest.fixture(scope="session")
def torch_sets(pytestconfig: pytest.Config) -> WorkingSets:
    return WorkingSets(int(pytestconfig.getoption("working_set") * 1e9))


@pytest.fixture(scope="session")
def meter() -> Meter:
    return Meter()


@pytest.fixture
def selected(case: Case) -> Iterator[Case]:
    """The case, with its threads and instruction set chosen."""
    torch.manual_seed(case.tokens)
    _C.select_isa(case.isa)
    _C.set_num_threads(case.threads)
    torch.set_num_threads(case.threads)
    yield case
    _C.select_isa("")
    _C.set_num_threads(0)


class Rivals:
    """Calls of other implementations, each timed once between two rounds of ours."""

    def __init__(self, calls: dict[str, list[Call]]) -> None:
        self._calls = calls
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._turn = 0

    def __call__(self) -> None:
        for name, calls in self._calls.items():
            start = time.perf_counter()
            calls[self._turn % len(calls)]()
            self.seconds[name].append(time.perf_counter() - start)
        self._turn += 1


def test_kernel(
    benchmark: Any,
    selected: Case,
    sets: WorkingSets,
    torch_sets: WorkingSets,
    meter: Meter,
    pytestconfig: pytest.Config,
    record_row: Any,
) -> None:
    case = selected
    with torch.inference_mode():
        work = BUILDERS[case.op](case, sets)
        compare = pytestconfig.getoption("compare") and case.op in kernels_torch.BUILDERS
        rivals = Rivals(kernels_torch.BUILDERS[case.op](case, torch_sets) if compare else {})
        turn = iter(range(10**9))

        def call() -> None:
            work.calls[next(turn) % len(work.calls)]()

        start = time.perf_counter()
        call()
        rounds = int(min(max(SECONDS / (time.perf_counter() - start), MIN_ROUNDS), MAX_ROUNDS))
        rivals()
        before = meter.measure(work)
        benchmark.group = f"{case.op}, {case.layer.name}"
        benchmark.pedantic(call, setup=rivals, rounds=rounds, warmup_rounds=1)
        limits = best(before, meter.measure(work))
    if benchmark.stats:
        theirs = {name: seconds[-rounds:] for name, seconds in rivals.seconds.items()}
        result = row(case, work, limits, list(benchmark.stats.stats.data), theirs)
        benchmark.extra_info.update(result)
        record_row(result)
