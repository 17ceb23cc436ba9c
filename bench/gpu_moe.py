"""A mixture of experts: proof against float64, what it promises, then time beside its floor and its peers."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gpu_peers
import torch
from gpu_clock import Clock
from gpu_limits import Limits, against_limits
from gpu_mixture import Mixture, random_tokens, relative_error
from gpu_shapes import ERROR_AT_MOST, TARGETS

from moe_runtime.kernels.triton.fused_moe import fused_moe

ROWS_CHECKED, ROWS_ALONE = 4, 2


def check(mixture: Mixture, num_tokens: int, clock: Clock) -> dict[str, Any]:
    """Error against float64; whether a token's bits are the same alone, again, and in a captured graph."""
    tokens = random_tokens(mixture.layer, num_tokens, clock.device, seed=1000 + num_tokens)
    run = mixture.call(0, tokens)
    out = run()
    rows = torch.randperm(num_tokens, device=clock.device)[:ROWS_CHECKED]
    alone = [slice(row, row + 1) for row in rows[:ROWS_ALONE].tolist()]
    nowhere = tokens.ids.clone().fill_(mixture.layer.experts)
    promises = {
        "same_alone": all(torch.equal(mixture.call(0, tokens.rows(row))(), out[row]) for row in alone),
        "same_again": all(torch.equal(run(), out) for _ in range(3)),
        "same_in_graph": _same_in_graph(run, out, clock),
        "outside_is_zero": not fused_moe(tokens.x, nowhere, tokens.weights, mixture.sets[0][0]).any().item(),
    }
    error = relative_error(out[rows], mixture.truth(tokens.rows(rows)))
    passed = error <= ERROR_AT_MOST and all(promises.values())
    return {"error": error, **promises, "passed": passed}


def _same_in_graph(run: Callable[[], torch.Tensor], out: torch.Tensor, clock: Clock) -> bool:
    if clock.device.type != "cuda":
        return True
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(captured, out)


def measure(
    mixture: Mixture,
    num_tokens: int,
    clock: Clock,
    limits: Limits,
    best_bf16: dict[tuple[str, int], float],
) -> dict[str, Any]:
    """One row of the table. ``best_bf16`` keeps the fastest peer of each layer and batch in bf16, which other
    formats are compared with, for torch has none of theirs.
    """
    layer = mixture.layer
    count = max(clock.fewest_calls, len(mixture.sets))
    inputs = [random_tokens(layer, num_tokens, clock.device, seed) for seed in range(count)]
    ours = clock.measure([mixture.call(place, tokens) for place, tokens in enumerate(inputs)])
    num_bytes = sum(mixture.bytes_needed(tokens) for tokens in inputs) / len(inputs)
    operations = layer.operations(num_tokens)
    peers = gpu_peers.measure(mixture, inputs, clock) if mixture.format == "bf16" else {}
    key = (layer.name, num_tokens)
    measured = [peer["seconds"]["median"] for peer in peers.values() if "seconds" in peer]
    if measured:
        best_bf16[key] = min(measured)
    row: dict[str, Any] = {
        "seconds": asdict(ours),
        "bytes": num_bytes,
        "operations": operations,
        **against_limits(ours, num_bytes, operations, limits),
        "peers": peers,
    }
    if key in best_bf16:
        row["ratio_to_best_peer"] = best_bf16[key] / ours.median
    row["targets"] = {
        target.name: row[target.value] >= target.least
        for target in TARGETS
        if target.applies(mixture.format, num_tokens) and target.value in row
    }
    return row
