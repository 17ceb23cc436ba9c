# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A mixture of experts: each token through its top_k gated MLPs, their outputs weighted and added up.

Two products with one buffer between them: gate and up with silu(gate) * up in the epilogue, down with the
routing weight in the epilogue; combine.py adds up the slots. A token's expert computes the same bits in both
ways to find the rows of an expert:

* Few pairs (T * top_k up to 64, a decode step): straight from the ids. One program per pair and column of
  weights; it looks through the ids for the other pairs of its expert, and all but the first of them leave.
  No sort, no lists, and an expert's weights are read once.
* More: sorted pairs and a list of tiles, made on the device (tile_lists.py). As many programs as the GPU
  holds walk through the tiles that exist.

T tokens, H hidden, I intermediate, E experts. An id outside 0..E-1 adds nothing, except that with
``constants`` [C, H] the ids E..E+C-1 name experts whose output is a constant vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import check_dims, failure
from moe_runtime.kernels.packed import WeightFormat
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check
from moe_runtime.kernels.triton.combine import combine, combine_add_norm
from moe_runtime.kernels.triton.expert_tiles import down_tile, gate_up_tile, same_expert, tile_and_column
from moe_runtime.kernels.triton.operands import AOT_FORMATS, aot_case, constants_of, operands_of, sizes_of
from moe_runtime.kernels.triton.tile_lists import list_tiles
from moe_runtime.kernels.triton.tiles import (
    FEW_TOKENS,
    GROUP_TILES,
    SMALL_PAIRS,
    Tile,
    expert_tile,
    launch_options,
    matrix_tiles,
    tuned_size,
)
from moe_runtime.kernels.triton.weights import DeviceExperts

# --- few pairs ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_up_few_kernel(
    x, ids, data, scales, zeros, row_scales, h, hidden, intermediate, stride, padded_k, num_pairs, top_k,
    num_experts, GROUPED: tl.constexpr, PAIRS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """h [pairs, I]. GROUPED: more than one token, whose experts may be the same."""
    pair = tl.program_id(1)
    expert = tl.load(ids + pair)
    pairs, count, before = pair + tl.zeros([TOKENS], dtype=tl.int32), 1, 0
    if GROUPED:
        pairs, count, before = same_expert(ids, pair, expert, num_pairs, PAIRS, TOKENS)
    if (expert >= 0) & (expert < num_experts) & (before % TOKENS == 0):
        gate_up_tile(
            x, pairs // top_k, pairs, count, expert, tl.program_id(0) * (ROWS // 2), data, scales, zeros,
            row_scales, h, hidden, intermediate, stride, padded_k,
            KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def _down_few_kernel(
    h, ids, weights, data, scales, zeros, row_scales, out, hidden, intermediate, stride, padded_k,
    num_pairs, num_experts, GROUPED: tl.constexpr, PAIRS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [pairs, H]"""
    pair = tl.program_id(1)
    expert = tl.load(ids + pair)
    pairs, count, before = pair + tl.zeros([TOKENS], dtype=tl.int32), 1, 0
    if GROUPED:
        pairs, count, before = same_expert(ids, pair, expert, num_pairs, PAIRS, TOKENS)
    if (expert >= 0) & (expert < num_experts) & (before % TOKENS == 0):
        down_tile(
            h, pairs, pairs, count, expert, tl.program_id(0) * ROWS, data, scales, zeros, row_scales,
            weights, out, hidden, intermediate, stride, padded_k,
            KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip


# --- many pairs ---------------------------------------------------------------------------------------------


@triton.jit
def _gate_up_kernel(
    x, sorted_pairs, tiles, num_tiles, data, scales, zeros, row_scales, h, hidden, intermediate, stride,
    padded_k, top_k, GROUP_TILES: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """h [places, I], in the order of ``sorted_pairs``."""
    existing = tl.load(num_tiles)
    columns = tl.cdiv(intermediate, ROWS // 2)
    for work in range(tl.program_id(0), existing * columns, tl.num_programs(0)):
        tile, column = tile_and_column(work, existing, columns, GROUP_TILES)
        expert, first = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
        places = first + tl.minimum(tl.arange(0, TOKENS), count - 1)
        tokens = tl.load(sorted_pairs + places) // top_k
        gate_up_tile(
            x, tokens, places, count, expert, column * (ROWS // 2), data, scales, zeros, row_scales, h,
            hidden, intermediate, stride, padded_k, KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip


@triton.jit
def _down_kernel(
    h, sorted_pairs, tiles, num_tiles, weights, data, scales, zeros, row_scales, out, hidden, intermediate,
    stride, padded_k, GROUP_TILES: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [pairs, H]"""
    existing = tl.load(num_tiles)
    columns = tl.cdiv(hidden, ROWS)
    for work in range(tl.program_id(0), existing * columns, tl.num_programs(0)):
        tile, column = tile_and_column(work, existing, columns, GROUP_TILES)
        expert, first = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
        count = tl.load(tiles + tile * 3 + 2)
        places = first + tl.minimum(tl.arange(0, TOKENS), count - 1)
        pairs = tl.load(sorted_pairs + places)
        down_tile(
            h, places, pairs, count, expert, column * ROWS, data, scales, zeros, row_scales, weights, out,
            hidden, intermediate, stride, padded_k, KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip


# --- wrappers -----------------------------------------------------------------------------------------------


def fused_moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: DeviceExperts,
    constants: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H], ids int32 [T, top_k], weights [T, top_k] -> [T, H]; plus ``added`` [T, H] if it is given."""
    rows = expert_rows(x, expert_ids, expert_weights, experts)
    return combine(rows, expert_ids, expert_weights, experts.num_experts, constants, added)


def fused_moe_add_norm(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: DeviceExperts,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    constants: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (rms_norm(total, norm_weight, eps), total), total being ``fused_moe`` + residual [T, H]."""
    rows = expert_rows(x, expert_ids, expert_weights, experts)
    return combine_add_norm(
        rows, expert_ids, expert_weights, experts.num_experts, residual, norm_weight, eps, constants, added
    )


def expert_moments(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: DeviceExperts,
    counted: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference.expert_moments. All ids must name experts. ``sums`` gets them expert by expert: atomics
    would add in another order each time.
    """
    outputs = expert_rows(x, expert_ids, torch.ones_like(expert_weights), experts)
    rows = outputs * expert_weights.view(-1, 1)
    mixed = combine(rows, expert_ids, expert_weights, experts.num_experts, None, None)
    chosen = expert_ids.view(-1)
    for expert in range(experts.num_experts):
        own = (chosen == expert).view_as(expert_ids) & counted.bool().unsqueeze(-1)
        sums[expert] += outputs[own.view(-1)].double().sum(0)
    squares = outputs.double().square().sum(-1)
    return mixed, squares.view_as(expert_weights), outputs.abs().amax(-1).view_as(expert_weights)


def expert_rows(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, experts: DeviceExperts
) -> torch.Tensor:
    """float32 [T * top_k, H]: weight times output of the expert of each (token, slot) pair; the rows of ids
    that name no expert are not written.
    """
    op, device = "fused_moe", experts.down.data.device
    if experts.layout != "device":
        raise failure(op, "experts", "packed for a device", f"packed as {experts.layout!r}")
    check_dims(op, "expert_ids", expert_ids, 2)
    tokens, top_k = expert_ids.shape
    check(op, "x", x, (tokens, experts.hidden), device)
    check(op, "expert_ids", expert_ids, (tokens, top_k), device, (torch.int32,))
    check(op, "expert_weights", expert_weights, (tokens, top_k), device)
    out = torch.empty(tokens * top_k, experts.hidden, device=device)
    if out.numel():
        few = tokens * top_k <= SMALL_PAIRS
        (_few_pairs if few else _many_pairs)(x, expert_ids, expert_weights, experts, out)
    return out


def _tile(experts: DeviceExperts, pairs: int) -> Tile:
    tuned = experts.tuned.get(tuned_size(pairs))
    return tuned[0] if tuned else expert_tile(experts.format.kind, pairs, experts.num_experts)


def _few_pairs(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: DeviceExperts, out: torch.Tensor
) -> None:
    gate_up, down, pairs = experts.gate_up, experts.down, ids.numel()
    hidden, intermediate = experts.hidden, experts.intermediate
    tile = _tile(experts, pairs)
    h = torch.empty(pairs, intermediate, dtype=gate_up.dot_dtype, device=x.device)
    options = launch_options(tile) | {"GROUPED": ids.shape[0] > 1, "PAIRS": SMALL_PAIRS}
    _gate_up_few_kernel[(triton.cdiv(intermediate, tile.rows // 2), pairs)](
        x, ids, *operands_of(gate_up), h, hidden, intermediate, *sizes_of(gate_up), pairs, ids.shape[1],
        experts.num_experts, **constants_of(gate_up, tile), **options,
    )  # fmt: skip
    _down_few_kernel[(triton.cdiv(hidden, tile.rows), pairs)](
        h, ids, weights, *operands_of(down), out, hidden, intermediate, *sizes_of(down), pairs,
        experts.num_experts, **constants_of(down, tile), **options,
    )  # fmt: skip


def _many_pairs(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: DeviceExperts, out: torch.Tensor
) -> None:
    gate_up, down, pairs = experts.gate_up, experts.down, ids.numel()
    hidden, intermediate = experts.hidden, experts.intermediate
    tile = _tile(experts, pairs)
    h = torch.empty(pairs, intermediate, dtype=gate_up.dot_dtype, device=x.device)
    lists = list_tiles(ids, experts.num_experts, tile.tokens)
    listed = (lists.pairs, lists.tiles, lists.num_tiles)
    options = launch_options(tile) | {"GROUP_TILES": GROUP_TILES}
    most = processors(x.device) * tile.per_processor
    # Rounded once, not by every program that reads it.
    _gate_up_kernel[(min(most, lists.bound * triton.cdiv(intermediate, tile.rows // 2)),)](
        x.to(gate_up.dot_dtype), *listed, *operands_of(gate_up), h, hidden, intermediate, *sizes_of(gate_up),
        ids.shape[1], **constants_of(gate_up, tile), **options,
    )  # fmt: skip
    _down_kernel[(min(most, lists.bound * triton.cdiv(hidden, tile.rows)),)](
        h, *listed, weights, *operands_of(down), out, hidden, intermediate, *sizes_of(down),
        **constants_of(down, tile), **options,
    )  # fmt: skip


def processors(device: torch.device) -> int:
    """Of the interpreter: few, so that programs have to walk."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- ahead of time ------------------------------------------------------------------------------------------


def _aot_cases(form: WeightFormat) -> Iterator[AotCase]:
    """Every tile, each way. Qwen3-30B-A3B, OLMoE, DeepSeek-V2-Lite and Mixtral all have an H and I of whole
    steps of the loop; no other size is known to the compiler, so that one case serves them all.
    """
    for tile in matrix_tiles(form.kind):
        name = f"{tile.rows}x{tile.tokens}"
        for kernel in (_gate_up_kernel, _down_kernel):
            yield aot_case(name, kernel, form, tile, True, GROUP_TILES=GROUP_TILES)
        for kernel in (_gate_up_few_kernel, _down_few_kernel):
            if tile.tokens <= FEW_TOKENS:
                yield aot_case(name, kernel, form, tile, False, GROUPED=True, PAIRS=SMALL_PAIRS)
            if tile.tokens == 16:
                yield aot_case(f"{name} alone", kernel, form, tile, False, GROUPED=False, PAIRS=SMALL_PAIRS)


AOT_CASES = tuple(case for form in AOT_FORMATS for case in _aot_cases(form))
