"""Is each kernel faster than what torch and transformers do on this machine? `make bench`.

One benchmark per operation, shape, number of tokens and side; sides of one question share a group.
Weights rotate over at least 1 GB (or all experts of a layer), so that decode reads memory and not the cache.
``extra_info`` holds GB/s of weights and GFLOP/s. Both sides use the same number of threads.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moe_runtime._C as _C
from moe_runtime.kernels import PackedExperts, RouterSpec, choose

sys.path.insert(0, str(Path(__file__).parent))  # the other benchmarks are scripts, which have it
from common import machine  # noqa: E402

KERNELS = choose("cpu")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8  # one layer of Qwen3-30B-A3B
WORKING_SET = 1 << 30

Call = Callable[[], Any]


@pytest.fixture(scope="session", autouse=True)
def machine_header(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(_C.num_threads())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{machine()}\nkernels: {_C.isa()}, {_C.num_threads()} threads")
    yield


def measure(benchmark: Any, group: str, call: Call, num_bytes: float, flops: float, rounds: int) -> None:
    benchmark.group = group
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    if benchmark.stats:
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(gb_per_s=num_bytes / median / 1e9, gflop_per_s=flops / median / 1e9)


def rotating(calls: list[Call]) -> Call:
    """Each round takes the next one."""
    turn = iter(range(10**9))
    return lambda: calls[next(turn) % len(calls)]()


def rounds_for(tokens: int) -> int:
    return 40 if tokens <= 16 else 5


# --- dense linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["ours", "torch"])
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("n", "k"), [(4096, 2048), (2048, 4096)])
def test_linear_bf16(benchmark: Any, n: int, k: int, tokens: int, side: str) -> None:
    torch.manual_seed(0)
    weights = [
        torch.randn(n, k, dtype=torch.bfloat16) / k**0.5 for _ in range(WORKING_SET // (n * k * 2) + 1)
    ]
    x = torch.randn(tokens, k)
    if side == "ours":
        packed = [KERNELS.pack_linear(weight) for weight in weights]
        calls: list[Call] = [functools.partial(KERNELS.linear, x, each) for each in packed]
    else:
        calls = [functools.partial(F.linear, x.bfloat16(), weight) for weight in weights]
    name = f"linear bf16 {n}x{k}, {tokens} tokens"
    measure(benchmark, name, rotating(calls), n * k * 2, 2 * tokens * n * k, rounds_for(tokens))


# --- experts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """transformers' own layout: gate_up [E, 2I, H], down [E, H, I], bf16."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        out = torch.empty(*shape, dtype=torch.bfloat16)
        for expert in out:
            expert.copy_(torch.randn(shape[1:], generator=generator) / shape[-1] ** 0.5)
        return out

    return {
        "gate_up_proj": random(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        "down_proj": random(EXPERTS, HIDDEN, INTERMEDIATE),
    }


@pytest.fixture(scope="module")
def packed(weights: dict[str, torch.Tensor]) -> PackedExperts:
    experts: PackedExperts = KERNELS.new_experts(EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)
    for expert_id in range(EXPERTS):
        gate, up = weights["gate_up_proj"][expert_id].chunk(2)
        KERNELS.pack_expert(experts, expert_id, "gate", gate)
        KERNELS.pack_expert(experts, expert_id, "up", up)
        KERNELS.pack_expert(experts, expert_id, "down", weights["down_proj"][expert_id])
    return experts


def expert_loop(
    x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The plain bf16 loop over the experts that were chosen."""
    out = torch.zeros_like(x)
    for expert_id in ids.unique().tolist():
        tokens, slots = torch.nonzero(ids == expert_id, as_tuple=True)
        gate, up = F.linear(x[tokens], weights["gate_up_proj"][expert_id]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, weights["down_proj"][expert_id])
        out.index_add_(0, tokens, y * scores[tokens, slots, None])
    return out


def transformers_experts(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: torch.nn.Module = Qwen3MoeExperts(config)
    module.load_state_dict(weights, assign=True)
    return module


@pytest.mark.parametrize("side", ["ours", "torch loop", "transformers grouped_mm"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_fused_moe_bf16(
    benchmark: Any, tokens: int, side: str, weights: dict[str, torch.Tensor], packed: PackedExperts
) -> None:
    torch.manual_seed(tokens)
    spec = RouterSpec(TOP_K, norm_topk_prob=True)
    calls: list[Call] = []
    active = 0
    for _ in range(16):  # new tokens, new experts
        x, (ids, scores) = torch.randn(tokens, HIDDEN), KERNELS.route(torch.randn(tokens, EXPERTS), spec)
        active += ids.unique().numel()
        half = (x.bfloat16(), ids.long(), scores.bfloat16())
        if side == "ours":
            calls.append(functools.partial(KERNELS.fused_moe, x, ids, scores, packed))
        elif side == "torch loop":
            calls.append(functools.partial(expert_loop, *half, weights))
        else:
            calls.append(functools.partial(transformers_experts(weights), *half))
    parameters = 3 * HIDDEN * INTERMEDIATE
    num_bytes, flops = active / 16 * parameters * 2, 2 * tokens * TOP_K * parameters
    name = f"experts bf16, Qwen3-30B-A3B layer, {tokens} tokens"
    measure(benchmark, name, rotating(calls), num_bytes, flops, rounds_for(tokens))


# --- attention ----------------------------------------------------------------------------------------------


def sdpa(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("side", ["ours", "torch sdpa"])
@pytest.mark.parametrize(("tokens", "context"), [(1, 4096), (512, 512)])
def test_attention_bf16_cache(benchmark: Any, tokens: int, context: int, side: str) -> None:
    """32 query heads, 4 key heads of 128: torch gets its cache contiguous, ours is paged by 16."""
    torch.manual_seed(0)
    q = torch.randn(tokens, 32, 128)
    calls: list[Call] = []
    for _ in range(16):
        keys, values = (torch.randn(context // 16, 4, 16, 128).bfloat16() for _ in range(2))
        if side == "ours":
            positions = torch.arange(context - tokens, context, dtype=torch.int32)
            rows, table = torch.zeros(tokens, dtype=torch.int32), torch.randperm(context // 16).int()[None]
            arguments = (q, keys, values, positions, rows, table.contiguous(), 128**-0.5)
            calls.append(functools.partial(KERNELS.attention, *arguments))
        else:
            flat = [c.transpose(0, 1).reshape(1, 4, context, 128) for c in (keys, values)]
            query = q.bfloat16().transpose(0, 1).unsqueeze(0).contiguous()
            k, v = flat
            calls.append(functools.partial(sdpa, query, k, v, causal=tokens > 1))
    num_bytes, flops = 2 * context * 4 * 128 * 2, 4 * tokens * 32 * 128 * (context - tokens / 2)
    name = f"attention 32/4 heads, {tokens} tokens on {context}"
    measure(benchmark, name, rotating(calls), num_bytes, flops, rounds_for(tokens))
