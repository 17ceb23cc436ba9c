"""What torch offers for the same operation and shape, in bf16: `--compare`.

torch has no integer expert kernels on a CPU, so every format of ours meets torch's bf16. Weights rotate
over a working set of the same size as ours.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernels_cases import Case, Layer
from kernels_workloads import CONTEXT, Call, WorkingSets, num_calls, routing

Rivals = dict[str, list[Call]]
Experts = list[tuple[torch.Tensor, torch.Tensor]]  # gate_up [E, 2I, H], down [E, H, I] of each layer


def matrices(n: int, k: int, num_bytes: int) -> torch.Tensor:
    """bf16 [count, N, K] of ``num_bytes`` together."""
    count = -(-num_bytes // (2 * n * k))
    room = torch.empty(count, n, k, dtype=torch.bfloat16)
    room[:] = torch.randn(n, k) / k**0.5
    return room


def linear(case: Case, sets: WorkingSets) -> Rivals:
    n, k = case.layer.linear_in if case.op == "linear_in" else case.layer.linear_out
    x = torch.randn(case.tokens, k).bfloat16()
    return {"torch.matmul": [functools.partial(F.linear, x, weight) for weight in sets.get(matrices, n, k)]}


def expert_layers(layer: Layer, num_bytes: int) -> Experts:
    width = 2 * layer.intermediate
    count = -(-num_bytes // (6 * layer.experts * layer.intermediate * layer.hidden))
    return [
        (
            matrices(width, layer.hidden, 2 * layer.experts * width * layer.hidden),
            matrices(layer.hidden, layer.intermediate, layer.experts * width * layer.hidden),
        )
        for _ in range(count)
    ]


def expert_loop(
    x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The plain loop over the experts that were chosen."""
    out = torch.zeros_like(x)
    for expert_id in ids.unique().tolist():
        tokens, slots = torch.nonzero(ids == expert_id, as_tuple=True)
        gate, up = torch.matmul(x[tokens], gate_up[expert_id].T).chunk(2, -1)
        y = torch.matmul(F.silu(gate) * up, down[expert_id].T)
        out.index_add_(0, tokens, y * scores[tokens, slots, None])
    return out


def grouped_experts(
    x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Tokens sorted by expert, two grouped products, and back; as transformers' grouped_mm experts do it."""
    order = ids.flatten().argsort()
    ends = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).cumsum(0).int()
    gate, up = torch._grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=ends).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * scores.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // ids.shape[1], y)


def experts(case: Case, sets: WorkingSets) -> Rivals:
    layers = sets.get(expert_layers, case.layer)
    expected = 1 - (1 - case.layer.top_k / case.layer.experts) ** case.tokens
    bytes_per_layer = 6 * case.layer.experts * case.layer.intermediate * case.layer.hidden
    choices = routing(case.layer, case.tokens, num_calls(expected * bytes_per_layer, sets.num_bytes))
    x = torch.randn(case.tokens, case.layer.hidden).bfloat16()

    def calls(side: Callable[..., torch.Tensor]) -> list[Call]:
        return [
            functools.partial(side, x, ids.long(), scores.bfloat16(), *weights)
            for (ids, scores), weights in zip(choices, itertools.cycle(layers), strict=False)
        ]

    return {"torch.matmul per expert": calls(expert_loop), "torch._grouped_mm": calls(grouped_experts)}


def caches(sequences: int, layer: Layer, length: int, num_bytes: int) -> torch.Tensor:
    """Keys and values bf16 [count, 2, sequences, key heads, length, D] of ``num_bytes``."""
    shape = (2, sequences, layer.kv_heads, length, layer.key_dim)
    room = torch.empty(-(-num_bytes // (2 * math.prod(shape))), *shape, dtype=torch.bfloat16)
    room[:] = torch.randn(length, layer.key_dim)
    return room


def attention(case: Case, sets: WorkingSets) -> Rivals:
    """torch gets keys and values contiguous, ours are paged by 16; latent attention has no counterpart."""
    layer, decode = case.layer, case.op == "attention_decode"
    if layer.latent_value:
        return {}
    sequences, length = (case.tokens, CONTEXT) if decode else (1, case.tokens)
    query = torch.randn(sequences, layer.heads, case.tokens // sequences, layer.key_dim).bfloat16()
    side = functools.partial(F.scaled_dot_product_attention, is_causal=not decode, enable_gqa=True)
    room = sets.get(caches, sequences, layer, length)
    return {"torch sdpa": [functools.partial(side, query, keys, values) for keys, values in room]}


BUILDERS: dict[str, Callable[[Case, WorkingSets], Rivals]] = {
    "linear_in": linear,
    "linear_out": linear,
    "experts": experts,
    "attention_decode": attention,
    "attention_prefill": attention,
}
