"""Weights in their final home on a device, written matrix by matrix from the checkpoint's (mapped) memory.

A home is allocated once; each matrix is copied a few megabytes at a time into its place and, if it is of
integers, put in order there, so that nothing of a model exists twice. N output features, K input features,
B matrices side by side (heads, or two per expert), G scale groups of a row. K is padded so that the inner
loop of products.py needs no mask on weights; what lies in the padding is multiplied by zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.packed import QuantizedWeight, Weight, WeightFormat
from moe_runtime.kernels.triton.tiles import Choice, block_k
from moe_runtime.kernels.triton.weight_bits import interleave_bytes, pack_nibbles, split_scales

BYTES_PER_COPY = 8 << 20  # of a matrix at a time; bounds the staging memory


@dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """``count`` matrices [N, K] of one format.

    data: [B, N, padded K] of the plain dtype, int8 (code - 128) or float8_e4m3fn, for int4 uint8
    [B, N, padded K / 2]; the order of elements within 32-bit words is in weight_bits.py.
    row_scales: float32 [B, N], of int8, int4 and float8 without groups. The value of an int4 weight is
    row_scale * scale * (code - zero), row_scale being a power of two.
    scales: float16 [B, G, N] of int4: rows side by side, so that they are fetched ahead like weights (a copy
    of less than 4 bytes cannot be asynchronous). float32 [B, N / 128, K / 128], rounded up, of float8 blocks.
    zeros: uint8 [B, G, N] of int4 with zero points, which are 8 without.
    tuned: by tuned_size of the number of rows, what was measured to be faster than tiles.py's choice.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    row_scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: WeightFormat
    out_features: int  # N
    in_features: int  # K
    count: int  # B
    tuned: dict[int, Choice] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        parts = (self.data, self.scales, self.row_scales, self.zeros)
        return tuple(part for part in parts if part is not None)

    @property
    def num_bytes(self) -> int:
        return int(sum(part.numel() * part.element_size() for part in self.parts))

    @property
    def words(self) -> torch.Tensor:
        """``data`` as the kernels address it: numbers of a plain dtype, else int32 words."""
        return self.data if self.format.is_plain else self.data.view(torch.int32)

    @property
    def dot_dtype(self) -> torch.dtype:
        """What weights and activations are multiplied in."""
        return self.data.dtype if self.format.is_plain else torch.bfloat16


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """As PackedLinear: one or several (``heads``) matrices [N, K]."""

    matrix: DeviceMatrix
    layout: Literal["device"] = "device"

    @property
    def data(self) -> torch.Tensor:
        return self.matrix.data

    @property
    def heads(self) -> int:
        return self.matrix.count

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    @property
    def in_features(self) -> int:
        return self.matrix.in_features

    @property
    def format(self) -> WeightFormat:
        return self.matrix.format

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes


@dataclass(frozen=True, eq=False)
class DeviceExperts:
    """As PackedExperts. gate_up: 2 E matrices [I, H], an expert's gate and up by turns; down: E [H, I].
    ``tuned``: as DeviceMatrix's, of both together, by the number of (token, expert) pairs.
    """

    gate_up: DeviceMatrix
    down: DeviceMatrix
    num_experts: int  # E
    hidden: int  # H
    intermediate: int  # I
    format: WeightFormat
    layout: Literal["device"] = "device"
    tuned: dict[int, Choice] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes + self.down.num_bytes


def padded_k(kind: str, k: int) -> int:
    return -(-k // block_k(kind)) * block_k(kind)


def format_of(weight: Weight) -> WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else WeightFormat.of(weight.dtype)


# --- homes --------------------------------------------------------------------------------------------------


def new_matrix(count: int, n: int, k: int, form: WeightFormat, device: torch.device) -> DeviceMatrix:
    """Zeroed home of ``count`` matrices [N, K]."""
    padded = padded_k(form.kind, k)
    if form.is_plain:
        data = torch.zeros(count, n, padded, dtype=form.dtype, device=device)
        return DeviceMatrix(data, None, None, None, form, n, k, count)
    if form.kind == "float8" and form.group:
        data = torch.zeros(count, n, padded, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        blocks = torch.zeros(count, -(-n // form.rows_per_scale), padded // form.group, device=device)
        return DeviceMatrix(data, blocks, None, None, form, n, k, count)
    row_scales = torch.zeros(count, n, device=device)
    if form.kind in ("int8", "float8"):
        data = torch.zeros(count, n, padded, dtype=torch.int8, device=device)
        data = data if form.kind == "int8" else data.view(torch.float8_e4m3fn)
        return DeviceMatrix(data, None, row_scales, None, form, n, k, count)
    data = torch.zeros(count, n, padded // 2, dtype=torch.uint8, device=device)
    groups = padded // form.group
    scales = torch.zeros(count, groups, n, dtype=torch.float16, device=device)
    zeros = torch.zeros(count, groups, n, dtype=torch.uint8, device=device) if form.zeros else None
    return DeviceMatrix(data, scales, row_scales, zeros, form, n, k, count)


def write_matrix(op: str, argument: str, home: DeviceMatrix, index: int, weight: Weight) -> None:
    """One matrix [N, K], on the CPU and perhaps mapped read-only, into its place."""
    shape = (home.out_features, home.in_features)
    if tuple(weight.shape) != shape or format_of(weight) != home.format:
        raise failure(
            op, argument, f"{home.format} {list(shape)}", f"{format_of(weight)} {list(weight.shape)}"
        )
    if not isinstance(weight, QuantizedWeight):
        for rows in _pieces(weight):
            home.data[index, rows, : shape[1]].copy_(weight[rows])
        return
    _write_codes(home, index, weight.codes)
    if home.scales is None:
        _part(home.row_scales)[index].copy_(weight.scales[:, 0])
        return
    if home.format.kind == "float8":
        home.scales[index].copy_(weight.scales)
        return
    halves, unit = split_scales(weight.scales)
    _part(home.row_scales)[index].copy_(unit)
    home.scales[index, : halves.shape[1]].copy_(halves.T.contiguous())
    if weight.zeros is not None:
        _part(home.zeros)[index, : halves.shape[1]].copy_(weight.zeros.T.contiguous())


def _pieces(matrix: torch.Tensor) -> Iterator[slice]:
    """Its rows, a few megabytes at a time."""
    step = max(1, BYTES_PER_COPY // max(matrix.shape[1] * matrix.element_size(), 1))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def _part(part: torch.Tensor | None) -> torch.Tensor:
    assert part is not None, "every home of this format has it"
    return part


def _write_codes(home: DeviceMatrix, index: int, codes: torch.Tensor) -> None:
    """Codes of one byte each, [N, K]; put in order on the device."""
    data, kind = home.data.view(torch.uint8)[index], home.format.kind  # not every operation knows float8
    missing = padded_k(kind, home.in_features) - home.in_features
    for rows in _pieces(codes):
        piece = codes[rows].view(torch.uint8).to(data.device)
        if kind == "int8":
            piece = piece ^ 128
        piece = torch.nn.functional.pad(piece, (0, missing))
        data[rows] = pack_nibbles(piece) if kind == "int4" else interleave_bytes(piece)


# --- reference.py's packing functions -----------------------------------------------------------------------


def pack_linear(weight: Weight, *, device: torch.device) -> DeviceLinear:
    """weight [N, K] -> on the device: its own copy, or the very tensor if that lies there as the kernels read
    it (an embedding that is the head, too).
    """
    if len(weight.shape) != 2:
        raise failure("pack_linear", "weight", "a matrix", list(weight.shape))
    if isinstance(weight, torch.Tensor) and weight.is_contiguous():
        (n, k), form = weight.shape, format_of(weight)
        if padded_k(form.kind, k) == k and weight.device == torch.empty(0, device=device).device:
            return DeviceLinear(DeviceMatrix(weight.unsqueeze(0), None, None, None, form, n, k, 1))
    return pack_linear_heads([weight], device=device)


def pack_linear_heads(weights: torch.Tensor | Sequence[Weight], *, device: torch.device) -> DeviceLinear:
    """weights [heads, N, K], or one [N, K] per head, all in one format."""
    op = "pack_linear_heads"
    if isinstance(weights, torch.Tensor) and weights.dim() != 3:
        raise failure(op, "weights", "a tensor of 3 dimensions", list(weights.shape))
    if not len(weights):
        raise failure(op, "weights", "at least one head", "none")
    (n, k), weight_format = weights[0].shape, format_of(weights[0])
    home = new_matrix(len(weights), n, k, weight_format, device)
    for head, weight in enumerate(weights):
        write_matrix(op, f"weights[{head}]", home, head, weight)
    return DeviceLinear(home)


def new_experts(
    num_experts: int,
    hidden: int,
    intermediate: int,
    weight_format: torch.dtype | WeightFormat,
    *,
    device: torch.device,
) -> DeviceExperts:
    """Zeroed home for E experts of [I, H], [I, H], [H, I]."""
    form = WeightFormat.of(weight_format)
    gate_up = new_matrix(2 * num_experts, intermediate, hidden, form, device)
    down = new_matrix(num_experts, hidden, intermediate, form, device)
    return DeviceExperts(gate_up, down, num_experts, hidden, intermediate, form)


def pack_expert(
    experts: DeviceExperts, expert_id: int, part: str, weight: Weight, *, device: torch.device
) -> None:
    """Writes one matrix of one expert in place; gate and up are [I, H], down is [H, I]."""
    if torch.empty(0, device=device).device != experts.down.data.device:
        raise failure("pack_expert", "experts", f"on {device}", f"on {experts.down.data.device}")
    home, index = expert_home("pack_expert", experts, expert_id, part)
    write_matrix("pack_expert", part, home, index, weight)


def expert_home(op: str, experts: DeviceExperts, expert_id: int, part: str) -> tuple[DeviceMatrix, int]:
    if not 0 <= expert_id < experts.num_experts:
        raise failure(op, "expert_id", f"0 <= id < {experts.num_experts}", expert_id)
    if part == "down":
        return experts.down, expert_id
    if part not in ("gate", "up"):
        raise failure(op, "part", "'gate', 'up' or 'down'", repr(part))
    return experts.gate_up, 2 * expert_id + int(part == "up")
