"""The draw of one token in C++ (csrc/sampling.cpp): what ``sampling.choose_token`` writes literally."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import moe_runtime._C as _C
from moe_runtime.kernels.checks import failure


def choose_token(
    row: npt.NDArray[Any], temperature: float, min_p: float, top_k: int, top_p: float, fraction: float
) -> int:
    """An id from softmax(row / temperature) after min-p, top-k and top-p, at ``fraction`` in [0, 1) of the
    mass of what is left, ids ascending; -1 when the largest of ``row`` (float32 [V]) is not finite.
    """
    if row.dtype != np.float32 or row.ndim != 1 or not row.flags.c_contiguous:
        raise failure("choose_token", "row", "contiguous float32 [V]", f"{row.dtype} {list(row.shape)}")
    return int(_C.choose_token(row.ctypes.data, row.size, temperature, min_p, max(top_k, 0), top_p, fraction))
