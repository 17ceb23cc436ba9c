"""AWQ as AutoAWQ's "gemm" version publishes it. int4.py says what the functions mean.

For a linear map of K inputs and N outputs: qweight int32 [K, N / 8], qzeros int32 [groups, N / 8]: eight
outputs per number, four bits each, in the order 0 2 4 6 1 3 5 7 from the lowest bits; scales [groups, N].
"""

import torch

from moe_runtime.quant.nibbles import nibbles

PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def code_shape(num_rows: int, in_features: int) -> tuple[int, int]:
    return in_features, num_rows // 8


def codes(qweight: torch.Tensor) -> torch.Tensor:
    return _outputs(qweight).t().contiguous()


def zeros(qzeros: torch.Tensor) -> torch.Tensor:
    return _outputs(qzeros).t().contiguous()


def _outputs(packed: torch.Tensor) -> torch.Tensor:
    """int32 [rows, N / 8] -> uint8 [rows, N]."""
    return nibbles(packed)[..., list(PLACE_OF_OUTPUT)].flatten(1)
