"""The limits that benchmarks measure beside their kernels: plausible, for every kind and awkward sizes."""

import math

import pytest
import torch

import moe_runtime._C as _C
from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import KINDS


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_every_kind_of_weight_has_a_peak_with_a_name(kind: int, num_threads: int, threads: None) -> None:
    _C.set_num_threads(num_threads)
    rate = _C.matrix_peak(kind, 0.001)
    assert math.isfinite(rate) and rate > 0
    assert _C.matrix_peak_name(kind)


@pytest.mark.parametrize("kind", [-1, len(KINDS)])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(KernelError, match=f"kind = {kind}"):
        _C.matrix_peak(kind, 0.001)


@pytest.mark.parametrize("size", [1, 255, 256, 4095, (2 << 20) + 1])
def test_memory_of_any_size_is_read_and_not_written(size: int) -> None:
    data = torch.full((size,), 7, dtype=torch.uint8)
    rate = _C.read_bandwidth(data.data_ptr(), size, 3)
    assert math.isfinite(rate) and rate > 0
    assert bool((data == 7).all())
