"""What this chip can do at most, measured: bytes per second of a copy, operations per second of a matmul.

The floor of every other measurement is computed from these two, never from a data sheet.
"""

from dataclasses import dataclass
from typing import Any

import torch
from gpu_clock import Clock, Timing


@dataclass(frozen=True)
class Limits:
    """Bytes read and written per second; multiplications and additions in bf16 per second."""

    bandwidth: float
    matmul: float

    def floor(self, num_bytes: float, operations: float) -> float:
        """Seconds below which no kernel on this chip can be."""
        return max(num_bytes / self.bandwidth, operations / self.matmul)


def against_limits(timing: Timing, num_bytes: float, operations: float, limits: Limits) -> dict[str, float]:
    """Fractions of the chip's own copy bandwidth and matrix rate, and of what both together allow."""
    return {
        "of_byte_floor": num_bytes / limits.bandwidth / timing.median,
        "of_matmul_rate": operations / limits.matmul / timing.median,
        "of_floor": limits.floor(num_bytes, operations) / timing.median,
    }


def measure(clock: Clock, dry_run: bool) -> Limits:
    return Limits(_bandwidth(clock, 1 << 20 if dry_run else 4 << 30), _matmul(clock, 64 if dry_run else 8192))


def _bandwidth(clock: Clock, size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=clock.device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / clock.measure([lambda: target.copy_(source)], seconds=0.5).median


def _matmul(clock: Clock, side: int) -> float:
    """On random numbers: zeros would be faster than any real data."""
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    return 2.0 * side**3 / clock.measure([lambda: a @ b], seconds=0.5).median


def chip(dry_run: bool) -> dict[str, Any]:
    """Which GPU this is, and which libraries."""
    facts: dict[str, Any] = {"torch": torch.__version__, "triton": _version("triton")}
    facts["transformers"] = _version("transformers")
    if dry_run:
        return {"name": "none (dry run)", **facts}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": getattr(properties, "L2_cache_size", 0) // 2**20,
        "runtime": f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        **facts,
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
