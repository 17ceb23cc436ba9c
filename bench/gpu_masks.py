"""What scenario masks cost: router and experts of one layer without, and with four masks mixed over rows.

The masks allow everything, so that the same experts are chosen and the same bytes are read: what is left is
the price of obeying them. Both ways are timed in turn, several times, because a percent is to be seen.
"""

from dataclasses import asdict
from typing import Any

import torch
from gpu_clock import Call, Clock
from gpu_mixture import Mixture
from gpu_shapes import MASK_COST_AT_MOST

from moe_runtime.kernels.packed import RouterSpec
from moe_runtime.kernels.triton.fused_moe import fused_moe
from moe_runtime.kernels.triton.router import NUM_ARRIVALS, route_tokens

MASKS = 4


def measure(mixture: Mixture, num_tokens: int, clock: Clock, rounds: int) -> dict[str, Any]:
    layer, device = mixture.layer, clock.device
    generator = torch.Generator(device).manual_seed(num_tokens)
    inputs = [torch.randn(num_tokens, layer.hidden, device=device, generator=generator) for _ in mixture.sets]
    router = torch.randn(layer.experts, layer.hidden, device=device, generator=generator).bfloat16()
    masks = torch.ones(MASKS, layer.experts, dtype=torch.uint8, device=device)
    rows = torch.arange(num_tokens, dtype=torch.int32, device=device) % MASKS
    arrivals = torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device)
    spec = RouterSpec(layer.top_k, norm_topk_prob=layer.norm_topk_prob)

    def step(which: int, x: torch.Tensor, masked: bool) -> Call:
        experts = mixture.sets[which][0]
        given = (masks, rows) if masked else (None, None)

        def run() -> torch.Tensor:
            ids, weights, _ = route_tokens(x, router, spec, None, *given, arrivals=arrivals)
            out: torch.Tensor = fused_moe(x, ids, weights, experts)
            return out

        return run

    plain = [step(which, x, False) for which, x in enumerate(inputs)]
    masked = [step(which, x, True) for which, x in enumerate(inputs)]
    same = all(torch.equal(one(), other()) for one, other in zip(plain, masked, strict=True))
    timings = [(clock.measure(plain), clock.measure(masked)) for _ in range(rounds)]
    costs = sorted(after.median / before.median - 1 for before, after in timings)
    cost = costs[len(costs) // 2]
    return {
        "seconds": asdict(timings[0][1]),
        "cost": cost,
        "costs": costs,
        "same_result": same,
        "targets": {"4 masks mixed: at most 1 %": same and cost <= MASK_COST_AT_MOST},
    }
