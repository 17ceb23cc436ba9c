"""GPTQ as AutoGPTQ and GPTQModel publish it. int4.py says what the functions mean.

For a linear map of K inputs and N outputs: qweight int32 [K / 8, N], eight inputs per number, the first in
the lowest bits; qzeros int32 [groups, N / 8], eight outputs per number; scales [groups, N]; g_idx int32 [K],
the group of each input.
"""

import torch

from moe_runtime.quant.nibbles import nibbles


def code_shape(num_rows: int, in_features: int) -> tuple[int, int]:
    return in_features // 8, num_rows


def codes(qweight: torch.Tensor) -> torch.Tensor:
    return nibbles(qweight).transpose(0, 1).flatten(1)


def zeros(qzeros: torch.Tensor) -> torch.Tensor:
    return nibbles(qzeros).flatten(1).t().contiguous()
