"""What captures a device's work so that it can be repeated: CUDA graphs, and HIP's under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from moe_runtime.device import free_bytes


class Recorder(Protocol):
    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run ``run`` once, then capture it; the result repeats it, on the same memory.

        Raises RuntimeError when the device cannot do that, OutOfMemoryError when it has no room.
        """

    def free_bytes(self) -> int:
        """Of the device's memory, what nobody has taken."""

    def settle(self) -> None:
        """Wait for the device, after ``record`` has failed. Raises RuntimeError if it is lost."""


class DeviceRecorder:
    """All graphs share one pool of memory: they never run side by side, and nothing stays in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # compiles what is not compiled yet, which cannot happen while capturing
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may copy weights meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def free_bytes(self) -> int:
        return free_bytes(self._device)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def recorder_for(device: torch.device) -> Recorder | None:
    """None where there is nothing to capture: on the CPU."""
    return DeviceRecorder(device) if device.type == "cuda" else None
