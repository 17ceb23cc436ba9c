"""Checks on what is handed to the C++ kernels, where a wrong shape would be a wild pointer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import WEIGHT_DTYPES


def failure(op: str, argument: str, expected: str, got: object) -> KernelError:
    return KernelError(f"{op}: {argument} is {got}, expected {expected}")


def check(
    op: str, argument: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """The address of a contiguous CPU tensor of exactly this shape and dtype."""
    if tensor.dtype is not dtype or tensor.shape != tuple(shape):
        raise failure(op, argument, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise failure(
            op, argument, "contiguous on the CPU", f"on {tensor.device} with strides {tensor.stride()}"
        )
    return int(tensor.data_ptr())


def check_dims(op: str, argument: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise failure(op, argument, f"a tensor of {dims} dimensions", list(tensor.shape))


def weight_tag(op: str, argument: str, dtype: torch.dtype) -> int:
    """csrc/layout.h's number of a weight dtype."""
    if dtype is torch.bfloat16:
        return 1
    if dtype is torch.float32:
        return 0
    if dtype is torch.float16:
        return 2
    raise failure(op, argument, f"one of {WEIGHT_DTYPES}", dtype)


def check_layout(op: str, layout: str) -> None:
    if layout != "panels":
        raise KernelError(f"{op}: weights are packed as {layout!r} for another backend, expected 'panels'")
