"""Sizes beyond 2^31 elements and bytes: no index may be computed in 32 bits.

Weights and caches are memory that nobody wrote, so it costs nothing but addresses; only their last corner
holds numbers. The mixture over a million tokens needs real memory and is skipped where there is too little.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from kernels.oracle import random_experts, random_routing

import moe_runtime._C as _C
from moe_runtime.kernels import PackedExperts, PackedLinear, WeightFormat, cpu, packing
from moe_runtime.layers.cache import zeroed

FORMAT = WeightFormat("bfloat16")


def test_a_linear_layer_of_more_than_two_billion_weights() -> None:
    n, k = (1 << 20) + 64, 2080
    assert n * k > 2**31
    corner = torch.randn(32, k).bfloat16()
    data = zeroed((1, _C.packed_bytes(n, k, FORMAT.tag)), torch.uint8)
    data[0, -_C.packed_bytes(32, k, FORMAT.tag) :] = packing.pack_linear(corner).data[0]
    x = torch.randn(2, k)
    out = cpu.linear(x, PackedLinear(data, 1, n, k, FORMAT, "panels"))
    assert not out[:, :-32].any()
    assert torch.equal(out[:, -32:], cpu.linear(x, packing.pack_linear(corner)))


def test_experts_of_more_than_two_billion_weights() -> None:
    experts, hidden, intermediate = 1400, 1024, 512
    assert experts * 3 * hidden * intermediate > 2**31
    small = random_experts(1, hidden, intermediate, torch.bfloat16).packed
    gate_up = zeroed((experts, small.gate_up.shape[1]), torch.uint8)
    down = zeroed((experts, small.down.shape[1]), torch.uint8)
    gate_up[-1], down[-1] = small.gate_up[0], small.down[0]
    large = PackedExperts(gate_up, down, experts, hidden, intermediate, FORMAT, "panels")
    x, weights = torch.randn(5, hidden), torch.ones(5, 2)
    ids = torch.tensor([[experts - 1, 700]], dtype=torch.int32).repeat(5, 1)
    expected = cpu.fused_moe(x, torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1), small)
    assert torch.equal(cpu.fused_moe(x, ids, weights, large), expected)


def test_a_cache_of_more_than_two_billion_numbers() -> None:
    blocks, heads, block_size, dim, length = 1 << 18, 4, 16, 128, 40
    k, v, q = torch.randn(length, heads, dim), torch.randn(length, heads, dim), torch.randn(1, 8, dim)
    answers = []
    for first in (blocks - 3, 0):  # the last three blocks of a large cache, the three blocks of a small one
        shape = (first + 3, heads, block_size, dim)
        keys, values = zeroed(shape, torch.bfloat16), zeroed(shape, torch.bfloat16)
        assert first == 0 or math.prod(shape) >= 2**31
        slots = torch.arange(length) + first * block_size
        cpu.write_cache(keys, k, slots)
        cpu.write_cache(values, v, slots)
        table = torch.arange(first, first + 3, dtype=torch.int32)[None]
        position, row = torch.tensor([length - 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        answers.append(cpu.attention(q, keys, values, position, row, table, dim**-0.5))
    assert torch.equal(*answers) and answers[0].abs().max() > 0


def available_gigabytes() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found.group(1)) / 1e6 if found else 0.0


@pytest.mark.slow
def test_a_mixture_over_a_million_tokens(isa: str) -> None:
    if isa != _C.supported_isas()[0]:
        pytest.skip("once is enough: the sizes are those of the code around the kernels")
    if available_gigabytes() < 8:
        pytest.skip("needs 5 GB")
    tokens, top_k, hidden = 1 << 20, 8, 64
    assert tokens * top_k * hidden * 4 >= 2**31
    moe = random_experts(8, hidden, 16, torch.bfloat16)
    x, (ids, weights) = torch.randn(16, hidden), random_routing(16, 8, top_k)
    expected = cpu.fused_moe(x, ids, weights, moe.packed)
    repeats = tokens // 16
    out = cpu.fused_moe(x.repeat(repeats, 1), ids.repeat(repeats, 1), weights.repeat(repeats, 1), moe.packed)
    assert torch.equal(out.view(repeats, 16, hidden), expected.expand(repeats, 16, hidden))
