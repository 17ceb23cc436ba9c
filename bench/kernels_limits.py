"""The roofline of one row: what memory and arithmetic allow on this machine, now, with as many threads."""

from dataclasses import dataclass

from kernels_workloads import Workload, huge_pages

import moe_runtime._C as _C

LARGEST = 1 << 30  # beyond every cache of today's servers
ENOUGH = 256 << 20  # smaller sets are read again and again
SECONDS = 0.02


@dataclass(frozen=True)
class Limits:
    """Bytes per second of reading a set of the row's size; operations per second of ``instruction``."""

    bandwidth: float
    peak: float
    instruction: str

    def bound(self, work: Workload) -> float:
        """Seconds per call that no kernel can beat."""
        return max(work.num_bytes / self.bandwidth, work.operations / self.peak)

    def limited_by(self, work: Workload) -> str:
        return "memory" if work.num_bytes / self.bandwidth > work.operations / self.peak else "arithmetic"


class Meter:
    """Owns the memory that it reads."""

    def __init__(self) -> None:
        self._buffer = huge_pages(LARGEST).fill_(1)

    def measure(self, work: Workload) -> Limits:
        """With the threads and the instruction set that are selected; the better of two readings."""
        size = int(min(max(work.working_set, 4096), LARGEST))
        kind = work.kind.tag & 0xFF
        passes = -(-ENOUGH // size)
        return Limits(
            max(_C.read_bandwidth(self._buffer.data_ptr(), size, passes) for _ in range(2)),
            max(_C.matrix_peak(kind, SECONDS) for _ in range(2)),
            _C.matrix_peak_name(kind),
        )


def best(before: Limits, after: Limits) -> Limits:
    return Limits(max(before.bandwidth, after.bandwidth), max(before.peak, after.peak), before.instruction)
