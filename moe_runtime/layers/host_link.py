"""The way between a device and the host's memory, beside the device's other work."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HostLink:
    """Copies to the host go on a stream of their own, so that the host waits for the numbers it asked for and
    not for what was queued after them. Where the device is the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Begin to copy tensors that were queued on the current stream. Call the result for the copies: it
        waits for them. It must be called before the tensors are given up.
        """
        stream = self._stream
        if stream is None:
            return lambda: tensors
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            copies = tuple(self.new(tensor.shape, tensor.dtype) for tensor in tensors)
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            arrived = stream.record_event()

        def wait() -> tuple[torch.Tensor, ...]:
            arrived.synchronize()
            return copies

        return wait

    def new(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor on the host, not initialised, that can be copied to and from without waiting."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of ``new``'s on the device, for what is queued on the current stream after it."""
        return tensor.to(self._device, non_blocking=True)
