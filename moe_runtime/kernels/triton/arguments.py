"""Checks on the tensors handed to a Triton kernel, where a wrong shape would be a wild pointer.

Only what the host knows: shape, dtype, device, contiguity. Values stay on the device and unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_runtime.kernels.checks import failure

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    op: str,
    argument: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """KernelError unless it is a contiguous tensor of this shape, of one of these dtypes, on this device."""
    if tensor.dtype not in dtypes or tensor.shape != tuple(shape):
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise failure(op, argument, f"{names} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device or not tensor.is_contiguous():
        raise failure(
            op, argument, f"contiguous on {device}", f"on {tensor.device} with strides {tensor.stride()}"
        )
