"""The C++ kernels: checks every tensor, then hands raw addresses to ``_C``. Meanings: reference.py.

Activations are contiguous float32 tensors on the CPU; anything else is a KernelError that names operation,
argument, expected and got. Values (expert ids, slots, positions, block ids) are checked in C++.
"""

from __future__ import annotations

import torch

import moe_runtime._C as _C
from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.kernels.checks import cache_tag, check, check_dims, check_fence, check_layout, failure
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import PackedExperts, PackedLinear, RouterSpec
from moe_runtime.kernels.residence import Residence
from moe_runtime.kernels.route_recovery import RouteRecovery

_FLOAT, _INT = torch.float32, torch.int32


def available() -> bool:
    """Whether this machine can run these kernels.

    Raises IsaUnavailable if MOE_FORCE_ISA asks for what it lacks, KernelError for a wrong MOE_NUM_THREADS.
    """
    if not _C.supported_isas():
        return False
    _C.isa()
    _C.num_threads()
    return True


def set_num_threads(count: int) -> None:
    """How many threads a kernel may use; 0 is MOE_NUM_THREADS, else what affinity and cgroup quota allow.

    The pool is one per process, as the cores are. No result depends on it. Raises KernelError for a negative
    count and above 256.
    """
    _C.set_num_threads(count)


# --- matrix products ----------------------------------------------------------------------------------------


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    check_layout("linear", packed.layout)
    check_dims("linear", "x", x, 2)
    n, k, rows = packed.out_features, packed.in_features, x.shape[0]
    if packed.heads != 1:
        raise failure("linear", "packed", "one head", f"{packed.heads} heads")
    x_at = check("linear", "x", x, (rows, k))
    bias_at = 0 if bias is None else check("linear", "bias", bias, (n,))
    out = torch.empty(rows, n, dtype=_FLOAT)
    _C.linear(x_at, rows, 1, k, packed.data.data_ptr(), n, packed.format.tag, bias_at, out.data_ptr())
    return out


def linear_heads(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    op = "linear_heads"
    check_layout(op, packed.layout)
    check_dims(op, "x", x, 3)
    heads, n, k, rows = packed.heads, packed.out_features, packed.in_features, x.shape[0]
    x_at = check(op, "x", x, (rows, heads, k))
    out = torch.empty(rows, heads, n, dtype=_FLOAT)
    _C.linear(x_at, rows, heads, k, packed.data.data_ptr(), n, packed.format.tag, 0, out.data_ptr())
    return out


def fused_moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: PackedExperts,
    constants: torch.Tensor | None = None,
) -> torch.Tensor:
    given = _mixture("fused_moe", x, expert_ids, expert_weights, experts)
    constants_at = num_constants = 0
    if constants is not None:
        num_constants = constants.shape[0]
        constants_at = check("fused_moe", "constants", constants, (num_constants, experts.hidden))
    out = torch.empty_like(x)
    _C.fused_moe(*given, constants_at, num_constants, out.data_ptr())
    return out


def expert_moments(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: PackedExperts,
    counted: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "expert_moments"
    given = _mixture(op, x, expert_ids, expert_weights, experts)
    counted_at = check(op, "counted", counted, (x.shape[0],), torch.uint8)
    sums_at = check(op, "sums", sums, (experts.num_experts, experts.hidden), torch.float64)
    out = torch.empty_like(x)
    squares = torch.empty(expert_ids.shape, dtype=torch.float64)
    peaks = torch.empty(expert_ids.shape, dtype=_FLOAT)
    _C.expert_moments(*given, counted_at, sums_at, out.data_ptr(), squares.data_ptr(), peaks.data_ptr())
    return out, squares, peaks


def _mixture(
    op: str, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, experts: PackedExperts
) -> tuple[int, ...]:
    """What csrc/moe.cpp wants of a mixture, but for where the result goes."""
    check_layout(op, experts.layout)
    check_dims(op, "expert_ids", expert_ids, 2)
    tokens, top_k = expert_ids.shape
    x_at = check(op, "x", x, (tokens, experts.hidden))
    ids_at = check(op, "expert_ids", expert_ids, (tokens, top_k), _INT)
    weights_at = check(op, "expert_weights", expert_weights, (tokens, top_k))
    return (
        x_at, ids_at, weights_at, experts.gate_up.data_ptr(), experts.down.data_ptr(),
        tokens, top_k, experts.hidden, experts.intermediate, experts.num_experts,
        experts.format.tag,
    )  # fmt: skip


def expert_slots(expert_ids: torch.Tensor, residence: Residence, num_constants: int = 0) -> torch.Tensor:
    op = "expert_slots"
    check_dims(op, "expert_ids", expert_ids, 2)
    tokens, top_k = expert_ids.shape
    num_experts = residence.slot_of.shape[0]
    ids_at = check(op, "expert_ids", expert_ids, (tokens, top_k), _INT)
    slot_of_at = check(op, "slot_of", residence.slot_of, (num_experts,), _INT)
    slots = torch.empty_like(expert_ids)
    _C.expert_slots(
        ids_at, tokens, top_k, slot_of_at, num_experts, residence.num_slots, residence.layer, num_constants,
        slots.data_ptr(),
    )  # fmt: skip
    return slots


# --- router, norms, positions -------------------------------------------------------------------------------


def route(
    logits: torch.Tensor,
    spec: RouterSpec,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
    meter: RouteMeter | None = None,
    recovery: RouteRecovery | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_dims("route", "logits", logits, 2)
    tokens, num_experts = logits.shape
    spec.check(num_experts)
    logits_at = check("route", "logits", logits, (tokens, num_experts))
    bias_at = 0 if bias is None else check("route", "bias", bias, (num_experts,))
    ids = torch.empty(tokens, spec.top_k, dtype=_INT)
    weights = torch.empty(tokens, spec.top_k, dtype=_FLOAT)
    fence = check_fence(tokens, num_experts, masks, mask_rows, recovery, meter)
    _C.route(
        logits_at, tokens, num_experts, bias_at, spec.top_k, spec.num_groups, spec.topk_groups,
        spec.scoring == "sigmoid", spec.norm_topk_prob, spec.group_score == "top2_sum",
        spec.softmax_after_topk, spec.routed_scaling, spec.norm_epsilon, *fence, ids.data_ptr(),
        weights.data_ptr(),
    )  # fmt: skip
    return ids, weights


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate_at = check("silu_mul", "gate", gate, gate.shape)
    up_at = check("silu_mul", "up", up, gate.shape)
    out = torch.empty_like(gate)
    _C.silu_mul(gate_at, up_at, gate.numel(), out.data_ptr())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    dim = x.shape[-1]
    x_at = check("rms_norm", "x", x, x.shape)
    weight_at = check("rms_norm", "weight", weight, (dim,))
    out = torch.empty_like(x)
    _C.rms_norm(x_at, 0, weight_at, eps, x.numel() // max(dim, 1), dim, out.data_ptr(), 0)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dim = x.shape[-1]
    x_at = check("add_rms_norm", "x", x, x.shape)
    residual_at = check("add_rms_norm", "residual", residual, x.shape)
    weight_at = check("add_rms_norm", "weight", weight, (dim,))
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // max(dim, 1)
    _C.rms_norm(x_at, residual_at, weight_at, eps, rows, dim, out.data_ptr(), total.data_ptr())
    return out, total


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    offset: int = 0,
) -> torch.Tensor:
    check_dims("rope", "x", x, 3)
    check_dims("rope", "cos", cos, 2)
    tokens, heads, dim = x.shape
    num_positions, half = cos.shape
    if not 0 <= offset <= dim - 2 * half:
        raise failure("rope", "offset", f"0 to {dim - 2 * half} (dim {dim}, rotated {2 * half})", offset)
    x_at = check("rope", "x", x, x.shape)
    cos_at = check("rope", "cos", cos, cos.shape)
    sin_at = check("rope", "sin", sin, cos.shape)
    positions_at = check("rope", "positions", positions, (tokens,), _INT)
    _C.rope(x_at, tokens, heads, dim, cos_at, sin_at, num_positions, half, positions_at, interleaved, offset)
    return x


# --- paged attention ----------------------------------------------------------------------------------------


def write_cache(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    op = "write_cache"
    check_dims(op, "cache", cache, 4)
    check_dims(op, "values", values, 3)
    num_blocks, heads, block_size, _ = cache.shape
    dim = values.shape[2]
    tag = cache_tag(op, "cache", cache)
    shape = (num_blocks, heads, block_size, row_size(dim, cache.dtype))
    cache_at = check(op, "cache", cache, shape, cache.dtype)
    tokens = slots.shape[0]
    values_at = check(op, "values", values, (tokens, heads, dim))
    slots_at = check(op, "slots", slots, (tokens,), torch.int64)
    _C.write_cache(cache_at, num_blocks, heads, block_size, dim, tag, values_at, slots_at, tokens)


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
    op = "attention"
    check_dims(op, "q", q, 3)
    check_dims(op, "k_cache", k_cache, 4)
    check_dims(op, "block_tables", block_tables, 2)
    tokens, heads, key_dim = q.shape
    num_blocks, kv_heads, block_size, _ = k_cache.shape
    sequences, max_blocks = block_tables.shape
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise failure(op, "q", f"a multiple of {kv_heads} heads", f"{heads} heads")
    if key_dim == 0:
        raise failure(op, "q", "heads of at least one number", list(q.shape))
    tag = cache_tag(op, "k_cache", k_cache)
    dtype, places = k_cache.dtype, (num_blocks, kv_heads, block_size)
    keys_at = check(op, "k_cache", k_cache, (*places, row_size(key_dim, dtype)), dtype)
    if v_cache is None:
        value_dim = key_dim if v_dim is None else v_dim
        values_at = 0
        if not 0 < value_dim <= key_dim:
            raise failure(op, "v_dim", f"1 to {key_dim}", v_dim)
    else:
        value_dim = v_dim or (key_dim if dtype is torch.int8 else v_cache.shape[-1])
        values_at = check(op, "v_cache", v_cache, (*places, row_size(value_dim, dtype)), dtype)
    q_at = check(op, "q", q, q.shape)
    positions_at = check(op, "positions", positions, (tokens,), _INT)
    rows_at = check(op, "sequence_rows", sequence_rows, (tokens,), _INT)
    tables_at = check(op, "block_tables", block_tables, (sequences, max_blocks), _INT)
    out = torch.empty(tokens, heads, value_dim, dtype=_FLOAT)
    _C.attention(
        q_at, tokens, heads, keys_at, values_at, num_blocks, kv_heads, block_size, key_dim, value_dim, tag,
        positions_at, rows_at, tables_at, sequences, max_blocks, scale, out.data_ptr(),
    )  # fmt: skip
    return out
