"""Seconds per call on a GPU: events around replays of a captured graph, over inputs that no cache can hold.

Every sample runs all ``calls`` in their order, each of which reads other weights than the ones before it, so
that the L2 cache has lost what a call reads by the time it is its turn again. On the CPU (``--dry-run``) the
wall clock stands in for events: the numbers mean nothing there, the way to them is the same.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
FEWEST, MOST = 5, 200  # samples


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles of samples. ``graph``: replayed, not launched singly."""

    median: float
    q1: float
    q3: float
    samples: int
    graph: bool

    @classmethod
    def of(cls, samples: Sequence[float], graph: bool) -> "Timing":
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        return cls(statistics.median(samples), quartiles[0], quartiles[2], len(samples), graph)


class GpuClock:
    """Of the current CUDA (or HIP) device."""

    device = torch.device("cuda")
    most_sets = 16  # of weights, at different addresses
    fewest_calls = 4  # in one sample, each with its own tokens and choices

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.l2_bytes = max(getattr(properties, "L2_cache_size", 0), 32 << 20)

    def measure(self, calls: Sequence[Call], seconds: float = 0.2, graph: bool = True) -> Timing:
        """``seconds`` is about how long the samples may take together, warm-up and capture apart."""
        for call in calls:  # compiles, and fills the allocator
            call()
        torch.cuda.synchronize()
        replay = self._capture(calls) if graph else None
        run = replay or (lambda: [call() for call in calls])
        run()
        once = max(self._elapsed(run, 1)[0], 1e-7)
        count = min(max(int(seconds / once), FEWEST), MOST)
        samples = [sample / len(calls) for sample in self._elapsed(run, count)]
        return Timing.of(samples, replay is not None)

    def _capture(self, calls: Sequence[Call]) -> Call | None:
        """The calls as one graph; None where one of them cannot be captured (it waits for the device)."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph.replay  # type: ignore[no-any-return]

    def _elapsed(self, run: Call, count: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in zip(marks, marks[1:], strict=False)]


class DryClock:
    """Runs every call once on the CPU."""

    device = torch.device("cpu")
    most_sets = 2
    fewest_calls = 1
    l2_bytes = 1 << 10

    def measure(self, calls: Sequence[Call], seconds: float = 0.0, graph: bool = True) -> Timing:
        start = time.perf_counter()
        for call in calls:
            call()
        return Timing.of([(time.perf_counter() - start) / len(calls)], graph=False)


Clock = GpuClock | DryClock


def make_clock(dry_run: bool) -> Clock:
    return DryClock() if dry_run else GpuClock()


def sets_needed(clock: Clock, bytes_per_call: float) -> int:
    """How many sets of weights to go round, so that twice the L2 cache is read between two uses of one."""
    return min(max(2, 1 + -(-2 * clock.l2_bytes // max(int(bytes_per_call), 1))), clock.most_sets)
