"""Four-bit numbers in int32, as AWQ and GPTQ store them."""

import torch


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [...] -> uint8 [..., 8], the lowest bits first."""
    pairs = packed.contiguous().unsqueeze(-1).view(torch.uint8)  # little-endian, as the file
    return torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2)
