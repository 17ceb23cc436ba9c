# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Router: hidden states or logits -> the top_k experts of each token and their weights.

``route`` starts from logits, a warp per token. ``route_tokens`` is one launch from the hidden states on,
meant for up to 64 tokens, where a launch costs as much as the work. Its programs share out the router's
weight by experts and K; whichever of a block of 16 tokens finishes last adds the pieces, in a fixed order,
and routes them. More tokens are allowed, because the two ways to logits add in different orders: whoever
needs a token's bits not to depend on its neighbours has to use the same one for every number of tokens.

T tokens, E experts, H hidden, M masks. The choice itself is in router_rows.py; what it means, with groups,
bias and masks, in reference.route. A mask row other than -1 that is out of range cannot raise here: it
forbids everything, so ids are 0..top_k-1 and weights 0. The mask row NOBODY pads a captured batch: its ids
are -1, which no expert's weights are read for.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import check_dims
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import RouterSpec
from moe_runtime.kernels.route_recovery import RouteRecovery
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import PLAIN_DTYPES, check
from moe_runtime.kernels.triton.router_arguments import (
    checked_masks,
    checked_recovery,
    checked_sums,
    new_results,
)
from moe_runtime.kernels.triton.router_rows import expert_tile, model_rules, route_rows
from moe_runtime.kernels.triton.tiles import (
    BLOCK_TOKENS,
    TOKENS_PER_LAUNCH,
    RouterTiles,
    router_tiles,
    rows_per_program,
)

NUM_ARRIVALS = TOKENS_PER_LAUNCH // BLOCK_TOKENS
VARYING = ("num_tokens", "num_masks")  # from step to step: their values must not mean another compilation

# --- from logits --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["mask_rows"])
def _route_kernel(
    logits, bias, masks, mask_rows, offsets, stand_ins, ids, weights, lost, outside, num_tokens, num_masks,
    ROWS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BY_LOGIT: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index, real = expert_tile(ROWS, NUM_EXPERTS, NUM_GROUPS, GROUPS_PADDED, SIZE_PADDED)
    at = tokens[:, None, None].to(tl.int64) * NUM_EXPERTS + index
    tile = tl.load(logits + at, mask=real & (tokens[:, None, None] < num_tokens), other=0.0)
    route_rows(
        tile, tokens, index, real, bias, masks, mask_rows, offsets, stand_ins, ids, weights, None, lost,
        outside, num_tokens, num_masks, NUM_EXPERTS, NUM_GROUPS, TOPK_GROUPS, TOP2, TOP_K, SIGMOID, BY_LOGIT,
        SOFTMAX_AFTER, NORMALISE, EPSILON, SCALING,
    )  # fmt: skip


def route(
    logits: torch.Tensor,
    spec: RouterSpec,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
    meter: RouteMeter | None = None,
    recovery: RouteRecovery | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E], masks [M, E], mask_rows [T] -> ids int32, weights float32, both [T, top_k].

    With masks ``meter`` is added to in the same launch, which chooses a second time, without them, and
    ``recovery`` says what is done about the experts that they forbid.
    """
    check_dims("route", "logits", logits, 2)
    tokens, num_experts = logits.shape
    check("route", "logits", logits, (tokens, num_experts), logits.device)
    rules = model_rules(spec, num_experts, bias is not None)
    masks, num_masks = checked_masks("route", tokens, num_experts, bias, masks, mask_rows, logits.device)
    recovers = checked_recovery("route", masks, recovery, logits.device)
    lost, outside = checked_sums("route", tokens, masks, meter, logits.device)
    ids, weights = new_results(tokens, spec.top_k, logits.device)
    if tokens:
        rows = rows_per_program(rules["GROUPS_PADDED"] * rules["SIZE_PADDED"])
        _route_kernel[(triton.cdiv(tokens, rows),)](
            logits, bias, masks, mask_rows, *recovers, ids, weights, lost, outside, tokens, num_masks, rows,
            **rules, num_warps=4,
        )  # fmt: skip
    return ids, weights


# --- from hidden states -------------------------------------------------------------------------------------


@triton.jit
def _partial_logits(
    x, weight, partials, first_token, num_tokens, expert_block, split,
    NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One piece of the product: [BLOCK_T, BLOCK_E] over SPLIT_K of the hidden dimensions."""
    tokens = first_token + tl.arange(0, BLOCK_T)
    experts = expert_block * BLOCK_E + tl.arange(0, BLOCK_E)
    known, chosen = tokens < num_tokens, experts < NUM_EXPERTS
    logits = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for step in range(SPLIT_K // BLOCK_K):
        k = split * SPLIT_K + step * BLOCK_K + tl.arange(0, BLOCK_K)
        states = tl.load(
            x + tokens[:, None].to(tl.int64) * HIDDEN + k[None, :],
            mask=known[:, None] & (k < HIDDEN)[None, :],
            other=0.0,
        )
        rows = tl.load(
            weight + experts[:, None].to(tl.int64) * STRIDE + k[None, :],
            mask=chosen[:, None] & (k < HIDDEN)[None, :],
            other=0.0,
        )
        logits = tl.dot(states.to(rows.dtype), tl.trans(rows), logits, input_precision="ieee")
    at = (split.to(tl.int64) * num_tokens + tokens[:, None]) * NUM_EXPERTS + experts[None, :]
    tl.store(partials + at, logits, mask=known[:, None] & chosen[None, :])


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["mask_rows"])
def _route_tokens_kernel(
    x, weight, bias, masks, mask_rows, offsets, stand_ins, partials, arrivals, ids, weights, histogram, lost,
    outside, num_tokens, num_masks, HIDDEN: tl.constexpr, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, ROWS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BY_LOGIT: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    splits: tl.constexpr = (HIDDEN + SPLIT_K - 1) // SPLIT_K
    # 1. This program's piece of the logits.
    first_token = tl.program_id(1) * BLOCK_T
    _partial_logits(
        x, weight, partials, first_token, num_tokens, tl.program_id(0) // splits, tl.program_id(0) % splits,
        NUM_EXPERTS, HIDDEN, STRIDE, BLOCK_T, BLOCK_E, BLOCK_K, SPLIT_K,
    )  # fmt: skip

    # 2. Whoever comes last finds all pieces. The barrier puts the stores of all threads before the one that
    # counts; the count is left at zero for the next launch.
    tl.debug_barrier()
    arrival = arrivals + tl.program_id(1)
    if tl.atomic_add(arrival, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrival, 0)
        index, real = expert_tile(ROWS, NUM_EXPERTS, NUM_GROUPS, GROUPS_PADDED, SIZE_PADDED)
        for row in range(0, tl.minimum(BLOCK_T, num_tokens - first_token), ROWS):
            tokens = first_token + row + tl.arange(0, ROWS)
            known = real & (tokens[:, None, None] < num_tokens)
            logits = tl.zeros([ROWS, GROUPS_PADDED, SIZE_PADDED], dtype=tl.float32)
            for split in range(splits):
                at = (tokens[:, None, None].to(tl.int64) + split * num_tokens) * NUM_EXPERTS + index
                # From the second-level cache: the first may not have seen other processors' stores.
                logits += tl.load(partials + at, mask=known, other=0.0, cache_modifier=".cg")
            route_rows(
                logits, tokens, index, real, bias, masks, mask_rows, offsets, stand_ins, ids, weights,
                histogram, lost, outside, num_tokens, num_masks, NUM_EXPERTS, NUM_GROUPS, TOPK_GROUPS, TOP2,
                TOP_K, SIGMOID, BY_LOGIT, SOFTMAX_AFTER, NORMALISE, EPSILON, SCALING,
            )  # fmt: skip


def route_tokens(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    spec: RouterSpec,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
    histogram: bool = False,
    arrivals: torch.Tensor | None = None,
    meter: RouteMeter | None = None,
    recovery: RouteRecovery | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [T, H], router_weight [E, H], its rows perhaps padded -> what ``route`` gives for
    x @ router_weight.T, and with ``histogram`` how often each expert was chosen, int32 [E]; what stands in
    for one does not count.

    ``arrivals``: zeros int32 [NUM_ARRIVALS] that the launch leaves as zeros. A caller that keeps one for each
    stream saves the launch that clears a new one.
    """
    op = "route_tokens"
    check_dims(op, "x", x, 2)
    check_dims(op, "router_weight", router_weight, 2)
    tokens, hidden = x.shape
    num_experts, device = router_weight.shape[0], x.device
    check(op, "x", x, (tokens, hidden), device)
    check(op, "router_weight", router_weight[:1], (1, hidden), device, PLAIN_DTYPES)
    rules = model_rules(spec, num_experts, bias is not None)
    masks, num_masks = checked_masks(op, tokens, num_experts, bias, masks, mask_rows, device)
    recovers = checked_recovery(op, masks, recovery, device)
    lost, outside = checked_sums(op, tokens, masks, meter, device)
    ids, weights = new_results(tokens, spec.top_k, device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device) if histogram else None
    if arrivals is None:
        arrivals = torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device)
    check(op, "arrivals", arrivals, (NUM_ARRIVALS,), device, (torch.int32,))
    tiles = router_tiles(rules["GROUPS_PADDED"] * rules["SIZE_PADDED"])
    splits = triton.cdiv(hidden, tiles.split_k)
    step = TOKENS_PER_LAUNCH
    partials = torch.empty(splits, min(tokens, step), num_experts, device=device)
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        rows = min(step, tokens - first)
        _route_tokens_kernel[
            (triton.cdiv(num_experts, tiles.block_experts) * splits, triton.cdiv(rows, BLOCK_TOKENS))
        ](
            x[part], router_weight, bias, masks, None if mask_rows is None else mask_rows[part], *recovers,
            partials, arrivals, ids[part], weights[part], counts, None if lost is None else lost[part],
            outside, rows, num_masks, **_pieces(hidden, router_weight.stride(0), tiles), **rules,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return ids, weights, counts


def _pieces(hidden: int, stride: int, tiles: RouterTiles) -> dict[str, Any]:
    """The constants of the product alone."""
    return {
        "HIDDEN": hidden,
        "STRIDE": stride,
        "BLOCK_T": BLOCK_TOKENS,
        "BLOCK_E": tiles.block_experts,
        "BLOCK_K": tiles.block_k,
        "SPLIT_K": tiles.split_k,
        "ROWS": tiles.rows,
    }


# --- ahead of time ------------------------------------------------------------------------------------------

_SPECS = MappingProxyType(
    {
        "qwen3_moe": (128, 2048, RouterSpec(8, norm_topk_prob=True)),
        "olmoe": (64, 2048, RouterSpec(8)),
        "mixtral": (8, 4096, RouterSpec(2, norm_topk_prob=True)),
        "deepseek_v2": (160, 5120, RouterSpec(6, num_groups=8, topk_groups=3)),
        "deepseek_v3": (256, 7168, RouterSpec(8, "sigmoid", True, 8, 4, "top2_sum", 2.5, False, 1e-20)),
        "glm4_moe": (128, 4096, RouterSpec(8, "sigmoid", True, norm_epsilon=1e-20)),
        "largest": (1024, 4096, RouterSpec(16, softmax_after_topk=True)),
    }
)


def _aot_cases(name: str) -> Iterator[AotCase]:
    """One model's router with masks, and with a bias where its scores are sigmoids; from hidden states also
    with a meter, and with that and a recovery.
    """
    num_experts, hidden, spec = _SPECS[name]
    has_bias = spec.scoring == "sigmoid"
    rules = model_rules(spec, num_experts, has_bias)
    padded = rules["GROUPS_PADDED"] * rules["SIZE_PADDED"]
    tiles = router_tiles(padded)
    given = {"bias": "*fp32" if has_bias else "constexpr", "masks": "*u8", "mask_rows": "*i32"}
    results = {"ids": "*i32", "weights": "*fp32"}
    sizes = {"num_tokens": "i32", "num_masks": "i32"}
    plain = dict.fromkeys(("offsets", "stand_ins"), "constexpr")
    unmetered = dict.fromkeys(("lost", "outside"), "constexpr")
    metered, recovering = {"lost": "*fp32", "outside": "*i64"}, {"offsets": "*fp32", "stand_ins": "*i32"}

    def case(
        kind: str, kernel: Any, arguments: dict[str, str], values: dict[str, Any], stages: int
    ) -> AotCase:
        values = values | {key: None for key, kind in arguments.items() if kind == "constexpr"}
        signature = arguments | dict.fromkeys(values, "constexpr")
        pointers = tuple(key for key, kind in arguments.items() if kind[0] == "*" and key != "mask_rows")
        return AotCase(f"{kind}-{name}", kernel, signature, values, 4, stages, pointers)

    arguments = {"logits": "*fp32"} | given | plain | results | unmetered | sizes
    yield case("route", _route_kernel, arguments, {"ROWS": rows_per_program(padded)} | rules, 1)
    constants = _pieces(hidden, hidden, tiles) | rules
    variants = (("", plain, unmetered), ("-metered", plain, metered), ("-recovering", recovering, metered))
    for dtype in ("bf16", "fp16", "fp32") if name == "qwen3_moe" else ("bf16",):
        for kind, recovery, meter in variants if dtype == "bf16" else variants[:1]:
            arguments = {"x": "*fp32", "weight": f"*{dtype}"} | given | recovery
            arguments |= {"partials": "*fp32", "arrivals": "*i32"} | results | {"histogram": "*i32"}
            arguments |= meter | sizes
            stages = tiles.num_stages
            yield case(f"route_tokens-{dtype}{kind}", _route_tokens_kernel, arguments, constants, stages)


AOT_CASES = tuple(case for name in _SPECS for case in _aot_cases(name))
