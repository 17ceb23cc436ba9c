"""The operations beside the experts, each beside its floor and its rivals in torch."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gpu_attention
import gpu_rows
from gpu_clock import Clock
from gpu_limits import Limits, against_limits
from gpu_shapes import ERROR_AT_MOST
from gpu_work import Case, Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    for sequences, length in sizes.decode:
        yield Case(
            "decode",
            f"gqa, {length} cached",
            "bf16",
            sequences,
            gpu_attention.grouped(sizes, sequences, length, 1),
        )
        yield Case(
            "decode",
            f"mla, {length} cached",
            "bf16",
            sequences,
            gpu_attention.latent(sizes, sequences, length),
        )
    for tokens in sizes.tokens:
        for weight_format in ("bf16", "int4"):
            for name, n, k in sizes.linears:
                if n * tokens <= 1 << 24:
                    yield Case(
                        "linear", name, weight_format, tokens, gpu_rows.matrix(n, k, weight_format, tokens)
                    )
        if tokens <= 64:
            yield Case(
                "route_tokens", f"{sizes.experts} experts", "bf16", tokens, gpu_rows.router(sizes, tokens)
            )
        yield Case("add_rms_norm", f"{sizes.hidden}", "float32", tokens, gpu_rows.norm(sizes.hidden, tokens))
        yield Case(
            "rope_write_cache", f"{sizes.kv_heads} heads", "bf16", tokens, gpu_rows.positions(sizes, tokens)
        )
    for tokens in sizes.prefill:
        yield Case("prefill", "gqa", "bf16", tokens, gpu_attention.grouped(sizes, 1, tokens, tokens))


def measure(case: Case, clock: Clock, limits: Limits) -> dict[str, Any]:
    work = case.build(clock)
    error = work.error() if work.error else None
    ours = clock.measure(work.calls)
    peers: dict[str, Any] = {}
    for name, calls in work.peers.items():
        try:
            peers[name] = {"seconds": asdict(clock.measure(calls))}
        except RuntimeError as problem:
            peers[name] = {"absent": f"{type(problem).__name__}: {str(problem)[:200]}"}
    row = {
        "seconds": asdict(ours),
        "bytes": work.num_bytes,
        "operations": work.operations,
        **against_limits(ours, work.num_bytes, work.operations, limits),
        "peers": peers,
        "error": error,
        "passed": error is None or error <= ERROR_AT_MOST,
    }
    best = [peer["seconds"]["median"] for peer in peers.values() if "seconds" in peer]
    return {**row, "ratio_to_best_peer": min(best) / ours.median} if best else row
