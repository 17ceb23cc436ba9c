"""Inputs, float64 truth and proven error bounds shared by the kernel tests.

A dot product of length K in float32 errs by at most about sqrt(K) * 2^-24 * sum |w||x| (random signs;
``SAFETY`` covers the tail). Where bf16 weights meet VDPBF16PS or TDPBF16PS, activations are rounded to bf16
first: 2^-8 of each product, and subnormal inputs count as zero.
"""

from dataclasses import dataclass

import torch

from moe_runtime.kernels import PackedExperts, RouterSpec, packing, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAFETY = 4.0
EPS = 2.0**-24
SUBNORMAL = 2.0**-126


def activation_eps(isa: str, dtype: torch.dtype) -> float:
    return 2.0**-8 if isa in ("avx512bf16", "amx") and dtype is torch.bfloat16 else 0.0


def dot_bound(x: torch.Tensor, weight: torch.Tensor, isa: str, dtype: torch.dtype) -> torch.Tensor:
    """Elementwise bound on the error of x @ weight.T; both float64."""
    k = x.shape[-1]
    relative = activation_eps(isa, dtype) + SAFETY * max(k, 1) ** 0.5 * EPS
    flushed = SUBNORMAL * (x.abs().sum(-1, keepdim=True) + weight.abs().sum(-1) + k)
    return relative * (x.abs() @ weight.abs().T) + flushed


@dataclass(frozen=True)
class Moe:
    """The same random experts, packed for the cpu backend and as rows."""

    packed: PackedExperts
    rows: PackedExperts


def random_experts(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, seed: int = 0
) -> Moe:
    generator = torch.Generator().manual_seed(seed)
    packed = packing.new_experts(num_experts, hidden, intermediate, dtype)
    rows = reference.new_experts(num_experts, hidden, intermediate, dtype)
    for expert_id in range(num_experts):
        for part in ("gate", "up", "down"):
            n, k = (hidden, intermediate) if part == "down" else (intermediate, hidden)
            weight = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
            packing.pack_expert(packed, expert_id, part, weight)
            reference.pack_expert(rows, expert_id, part, weight)
    return Moe(packed, rows)


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return reference.route(logits, RouterSpec(top_k, norm_topk_prob=True))


def moe_truth_and_bound(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, rows: PackedExperts, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 output and the elementwise bound, carried through SiLU (slope <= 1.1) and both products."""
    truth = reference.fused_moe(x.double(), ids, weights.double(), rows)
    bound = torch.zeros_like(truth)
    x = x.double()
    for expert_id in ids.unique().tolist():
        tokens, slots = torch.nonzero(ids == expert_id, as_tuple=True)
        gate_weight, up_weight = rows.gate_up[expert_id].double()
        down_weight = rows.down[expert_id].double()
        chosen = x[tokens]
        gate, up = chosen @ gate_weight.T, chosen @ up_weight.T
        gate_error = 1.1 * dot_bound(chosen, gate_weight, isa, rows.format.dtype)
        up_error = dot_bound(chosen, up_weight, isa, rows.format.dtype)
        activated = torch.nn.functional.silu(gate)
        h = activated * up
        h_error = gate_error * (up.abs() + up_error) + activated.abs() * up_error + 16 * EPS * h.abs()
        error = h_error @ down_weight.abs().T + dot_bound(
            h.abs() + h_error, down_weight, isa, rows.format.dtype
        )
        scale = weights[tokens, slots].double().abs().unsqueeze(1)
        bound.index_add_(0, tokens, scale * (error + 16 * EPS * (h @ down_weight.T).abs()))
    return truth, bound + SUBNORMAL + ids.shape[1] * EPS * truth.abs()


def assert_within(got: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    assert got.shape == truth.shape
    excess = (got.double() - truth).abs() - bound
    assert not torch.any(excess > 0) and not torch.any(excess.isnan()), (
        f"error exceeds its bound by {excess.max()}"
    )
