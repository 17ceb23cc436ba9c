"""What the host tells products.py of a matrix: its tensors, sizes and compile-time constants; and the same,
without a tensor at hand, for compilation ahead of time.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from moe_runtime.kernels.packed import WeightFormat
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.tiles import Tile, block_k
from moe_runtime.kernels.triton.weights import DeviceMatrix


def operands_of(matrix: DeviceMatrix) -> tuple[torch.Tensor | None, ...]:
    """data, scales, zeros, row_scales"""
    return matrix.words, matrix.scales, matrix.zeros, matrix.row_scales


def sizes_of(matrix: DeviceMatrix) -> tuple[int, int]:
    """stride, padded_k: of a row, in elements or words, and in numbers."""
    stride = matrix.words.shape[2]
    return stride, stride * {"int4": 8, "int8": 4, "float8": 4}.get(matrix.format.kind, 1)


def constants_of(matrix: DeviceMatrix, tile: Tile) -> dict[str, Any]:
    return constants_for(matrix.format, matrix.in_features, tile)


def constants_for(form: WeightFormat, in_features: int, tile: Tile) -> dict[str, Any]:
    size = block_k(form.kind)
    return {
        "KIND": "plain" if form.is_plain else form.kind,
        "GROUP": form.group,
        "EVEN_K": in_features % size == 0,
        "BLOCK_K": size,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
    }


# --- ahead of time ------------------------------------------------------------------------------------------

AOT_FORMATS: tuple[WeightFormat, ...] = (
    WeightFormat("bfloat16"),
    WeightFormat("int4", 128),
    WeightFormat("int8"),
    WeightFormat("float8", 128),
    WeightFormat("float8"),
    WeightFormat("float16"),
    WeightFormat("float32"),
    WeightFormat("int4", 128, True),
    WeightFormat("int4", 64),
    WeightFormat("int4", 64, True),
    WeightFormat("int4", 32),
    WeightFormat("int4", 32, True),
)
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


# The arguments that kernels of matrix products have in common.
_TYPES = MappingProxyType(
    {
        **dict.fromkeys(("ids", "sorted_pairs", "tiles", "num_tiles"), "*i32"),
        **dict.fromkeys(("weights", "bias", "out", "partials"), "*fp32"),
        **dict.fromkeys(("hidden", "intermediate", "stride", "padded_k", "x_stride", "out_stride"), "i32"),
        **dict.fromkeys(("top_k", "num_experts", "num_pairs", "M", "N", "K"), "i32"),
    }
)
_ALIGNED = ("hidden", "intermediate", "N", "K", "stride", "padded_k", "x_stride", "out_stride")


def aot_case(
    detail: str, kernel: Any, form: WeightFormat, tile: Tile, rounded: bool, **values: Any
) -> AotCase:
    """``kernel`` for one tile and format, with K a whole number of steps, as it is in every model we know.
    ``rounded``: activations come in what they are multiplied in, not in float32.
    """
    dot = _SHORT.get(form.kind, "bf16")
    types = dict(_TYPES) | _matrix_types(form) | {"h": f"*{dot}", "x": f"*{dot}" if rounded else "*fp32"}
    values = constants_for(form, 4096, tile) | values
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values |= {name: None for name, kind in signature.items() if kind == "constexpr" and name.islower()}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in _ALIGNED)
    return AotCase(f"{form} {detail}", kernel, signature, values, tile.num_warps, tile.num_stages, aligned)


def _matrix_types(form: WeightFormat) -> dict[str, str]:
    """Of ``operands_of``, without what the format lacks."""
    blocks = form.kind == "float8" and form.group > 0
    types = {"data": f"*{_SHORT.get(form.kind, 'i32')}"}
    if form.kind == "int4" or blocks:
        types["scales"] = "*fp32" if blocks else "*fp16"
    if form.zeros:
        types["zeros"] = "*u8"
    if not form.is_plain and not blocks:
        types["row_scales"] = "*fp32"
    return types
