"""Every operation in literal torch: the oracle the fast kernels must equal, and a path that runs anywhere.

Works in the dtype of the activations: float32 in service, float64 when a test wants the truth. Knows
nothing of packing, threads or speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moe_runtime.errors import KernelError
from moe_runtime.kernels.cache_rows import quantize_rows, read_rows
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import PackedExperts, PackedLinear, QuantizedWeight, RouterSpec, WeightFormat
from moe_runtime.kernels.reference_choice import best_first, forbidden_experts, in_chosen_groups, weigh
from moe_runtime.kernels.reference_recovery import named, recovered
from moe_runtime.kernels.route_recovery import RouteRecovery

# --- linear -------------------------------------------------------------------------------------------------


def _rows(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _format(weight: torch.Tensor | QuantizedWeight) -> WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else WeightFormat.of(weight.dtype)


def pack_linear(weight: torch.Tensor | QuantizedWeight) -> PackedLinear:
    """weight [N, K] -> itself, as "rows"; dequantised if it was quantised."""
    return pack_linear_heads([weight])


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] -> x @ weight.T + bias, [M, N]."""
    return F.linear(x, packed.data[0].to(x.dtype), None if bias is None else bias.to(x.dtype))


def pack_linear_heads(weights: torch.Tensor | Sequence[torch.Tensor | QuantizedWeight]) -> PackedLinear:
    """weights [heads, N, K], or one [N, K] per head -> [heads, N, K], as "rows"."""
    if isinstance(weights, torch.Tensor):
        data, weight_format = weights.contiguous(), WeightFormat.of(weights.dtype)
    else:
        first = _rows(weights[0])
        data = first.unsqueeze(0) if len(weights) == 1 else torch.stack([_rows(weight) for weight in weights])
        weight_format = _format(weights[0])
    heads, out_features, in_features = data.shape
    return PackedLinear(data.contiguous(), heads, out_features, in_features, weight_format, "rows")


def linear_heads(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """x [T, heads, K] -> [T, heads, N], each head through its own weight."""
    return torch.einsum("thk,hnk->thn", x, packed.data.to(x.dtype))


# --- experts ------------------------------------------------------------------------------------------------


def new_experts(
    num_experts: int, hidden: int, intermediate: int, weight_format: torch.dtype | WeightFormat
) -> PackedExperts:
    """Zeroed home for E experts of [I, H], [I, H], [H, I]."""
    weight_format = WeightFormat.of(weight_format)
    dtype = weight_format.dtype
    gate_up = torch.zeros(num_experts, 2, intermediate, hidden, dtype=dtype)
    down = torch.zeros(num_experts, hidden, intermediate, dtype=dtype)
    return PackedExperts(gate_up, down, num_experts, hidden, intermediate, weight_format, "rows")


def pack_expert(
    experts: PackedExperts, expert_id: int, part: str, weight: torch.Tensor | QuantizedWeight
) -> None:
    """Writes one matrix of one expert in place; gate and up are [I, H], down is [H, I]."""
    if not 0 <= expert_id < experts.num_experts:
        raise KernelError(f"pack_expert: expert_id = {expert_id}, expected 0 <= id < {experts.num_experts}")
    if part not in ("gate", "up", "down"):
        raise KernelError(f"pack_expert: part = {part!r}, expected 'gate', 'up' or 'down'")
    home = experts.down[expert_id] if part == "down" else experts.gate_up[expert_id, int(part == "up")]
    if weight.shape != home.shape or _format(weight) != experts.format:
        raise KernelError(
            f"pack_expert: {part} is {_format(weight)} {list(weight.shape)}, "
            f"expected {experts.format} {list(home.shape)}"
        )
    home.copy_(_rows(weight))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def fused_moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: PackedExperts,
    constants: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H], ids int32 [T, top_k], weights [T, top_k] -> [T, H].

    out[t] = sum over slots, in slot order, of weight[t, slot] * expert ids[t, slot] of x[t]; with constants
    float32 [C, H] the ids E..E+C-1 name experts that give one of them for every x.
    """
    slots = _expert_outputs(x, expert_ids, experts, constants)
    out = torch.zeros_like(x)
    for slot in range(expert_ids.shape[1]):
        out += expert_weights[:, slot, None].to(x.dtype) * slots[:, slot]
    return out


def expert_moments(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: PackedExperts,
    counted: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (``fused_moe``, bit for bit; of each expert's output before its weight the sum of squares, float64
    [T, top_k], and the largest absolute number, float32 [T, top_k]).

    The outputs of the tokens of ``counted`` (uint8 [T], 0 or 1) are added to ``sums`` float64 [E, H].
    """
    slots = _expert_outputs(x, expert_ids, experts)
    taken = counted.bool()
    sums.index_add_(0, expert_ids[taken].flatten().long(), slots[taken].flatten(0, 1).double())
    mixed = fused_moe(x, expert_ids, expert_weights, experts)
    return mixed, slots.double().square().sum(-1), slots.abs().amax(-1)


def _expert_outputs(
    x: torch.Tensor, expert_ids: torch.Tensor, experts: PackedExperts, constants: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, top_k, H]: what each expert makes of its tokens."""
    slots = x.new_empty(*expert_ids.shape, experts.hidden)
    known = experts.num_experts + (0 if constants is None else len(constants))
    for expert_id in expert_ids.unique().tolist():
        if not 0 <= expert_id < known:
            raise KernelError(f"fused_moe: expert id {expert_id}, expected 0 <= id < {known}")
        rows, columns = torch.nonzero(expert_ids == expert_id, as_tuple=True)
        if constants is not None and expert_id >= experts.num_experts:
            slots[rows, columns] = constants[expert_id - experts.num_experts].to(x.dtype)
            continue
        gate, up = experts.gate_up[expert_id].to(x.dtype)
        hidden = silu_mul(x[rows] @ gate.T, x[rows] @ up.T)
        slots[rows, columns] = hidden @ experts.down[expert_id].to(x.dtype).T
    return slots


# --- router -------------------------------------------------------------------------------------------------


def route(
    logits: torch.Tensor,
    spec: RouterSpec,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
    meter: RouteMeter | None = None,
    recovery: RouteRecovery | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E] for the choice only -> ids int32 [T, top_k], best first; weights [T, top_k].

    Ids are distinct and in range for any logits; the rules are in RouterSpec. masks [M, E], uint8 or bool,
    say which experts may be used (1), mask_rows int32 [T] which mask a token obeys (-1: none). A forbidden
    expert is out of the race before the softmax and adds nothing to its group's score. Groups with an allowed
    expert come before those without, and where the chosen groups hold fewer than top_k allowed experts, the
    best allowed ones of the other groups follow: a mask that allows at least top_k experts is never left. One
    that allows fewer is for the caller to refuse; here the lowest forbidden ids fill up, with weight 0.
    ``meter`` is added to where there are masks, ``recovery`` (see there) changes what they do.
    """
    num_tokens, num_experts = logits.shape
    spec.check(num_experts)
    forbidden = forbidden_experts(num_tokens, num_experts, masks, mask_rows).to(logits.device)
    given, stand_ins = logits, torch.full_like(forbidden, -1, dtype=torch.int64)
    if recovery is not None:
        logits, stand_ins = recovered(logits, recovery, masks, mask_rows)
        forbidden &= stand_ins < 0
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    finite = logits.double().nan_to_num(nan=lowest, neginf=lowest, posinf=highest).clamp(lowest, highest)
    fenced = finite.masked_fill(forbidden, -torch.inf)
    scores = fenced.softmax(-1) if spec.scoring == "softmax" else fenced.sigmoid()
    scores = scores.masked_fill(forbidden, 0.0)  # NaN where nothing is allowed

    # The choice is made in float32, so that it can be compared with float32 kernels bit by bit.
    choice = finite.float() if spec.chooses_by_logit(bias is not None) else scores.float()
    if bias is not None:
        choice = choice + bias.float()
    choice = choice.nan_to_num(nan=lowest, neginf=lowest, posinf=highest).masked_fill(forbidden, -torch.inf)
    level = (~forbidden).int()
    if spec.num_groups > 1:
        level = level * (1 + in_chosen_groups(choice, spec))
    ids = best_first(level, choice)[:, : spec.top_k]

    weights = weigh(ids, fenced, scores, forbidden, spec)
    ids = named(ids, stand_ins)
    if meter is not None and masks is not None and mask_rows is not None:
        meter.add_outside(ids, masks, mask_rows)
        meter.add_lost(*route(given, spec, bias), masks, mask_rows)
    return ids.int(), weights.to(logits.dtype)


# --- norms and positions ------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    offset: int = 0,
) -> torch.Tensor:
    """Rotates dims [offset, offset + R) of x [T, heads, D] in place and returns x.

    cos and sin are [P, R/2]. Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; they stay in place.
    """
    half = cos.shape[1]
    turned = x[..., offset : offset + 2 * half]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    c = cos[positions.long()].unsqueeze(1).to(x.dtype)
    s = sin[positions.long()].unsqueeze(1).to(x.dtype)
    rotated_first, rotated_second = first * c - second * s, second * c + first * s
    first.copy_(rotated_first)
    second.copy_(rotated_second)
    return x


# --- paged attention ----------------------------------------------------------------------------------------


def write_cache(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """cache [num_blocks, heads, block_size, D] <- values [T, heads, D], one row per token; in an int8 cache
    a row is ``row_size(D)`` bytes (cache_rows.py).

    slots [T] int64: slot = block_id * block_size + offset in the block.
    """
    block_size = cache.shape[2]
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < cache.shape[0] * block_size:
        raise KernelError(
            f"write_cache: slots out of range, expected 0 <= slot < {cache.shape[0] * block_size}"
        )
    rows = quantize_rows(values.float()) if cache.dtype is torch.int8 else values.to(cache.dtype)
    cache[slots // block_size, :, slots % block_size] = rows


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    positions: torch.Tensor,
    sequence_rows: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    v_dim: int | None = None,
) -> torch.Tensor:
    """q [T, Hq, Dk] against the paged cache -> [T, Hq, Dv].

    k_cache is [B, Hkv, block_size, Dk], v_cache [B, Hkv, block_size, Dv]. v_cache None means that the values
    are the first ``v_dim`` columns of k_cache (MLA). Rows of int8 caches are as in ``write_cache``; those of
    v_cache hold ``v_dim`` values, or Dk if it is not given. Token t attends to positions 0..positions[t] of
    the sequence whose blocks are block_tables[sequence_rows[t]]. Query head h reads key head h // (Hq / Hkv).
    """
    num_tokens, num_heads, key_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    value_dim = v_dim or (key_dim if v_cache is None or v_cache.dtype is torch.int8 else v_cache.shape[-1])
    out = q.new_empty(num_tokens, num_heads, value_dim)
    for token in range(num_tokens):
        length = int(positions[token]) + 1
        blocks = block_tables[int(sequence_rows[token]), : -(-length // block_size)].long()
        k = read_rows(k_cache, blocks, length, key_dim, q.dtype)
        v = k[..., :value_dim] if v_cache is None else read_rows(v_cache, blocks, length, value_dim, q.dtype)
        heads = q[token].view(kv_heads, num_heads // kv_heads, -1)
        probabilities = (heads @ k.transpose(1, 2) * scale).softmax(-1)
        out[token] = (probabilities @ v).view(num_heads, -1)
    return out
