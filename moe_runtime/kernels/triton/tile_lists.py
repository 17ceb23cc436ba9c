# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Pairs (token, slot) put in order of their experts, and the list of tiles that covers exactly those.

The list is made on the device and read on the device: no padding of experts to whole tiles, no grid for the
worst case, no host that waits. Two launches: count each chunk's pairs per expert; then every chunk adds up
the counts before it and places its own pairs. The order is stable (pairs of an expert by rising number) and
has no atomics in it, so it is the same in every run. Ids that name no expert are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.tiles import CHUNK_PAIRS, power_of_two, sort_step


@dataclass(frozen=True)
class TileLists:
    """``pairs`` int32 [P], the first of which are sorted. ``tiles`` int32 [bound, 3]: expert, first place in
    ``pairs``, how many; ``num_tiles`` int32 [1] of them exist.
    """

    pairs: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor

    @property
    def bound(self) -> int:
        return self.tiles.shape[0]


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    ids, counts, num_pairs, num_experts, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """-> counts [chunks, EXPERTS]"""
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, CHUNK, STEP):
        pair = chunk * CHUNK + start + tl.arange(0, STEP)
        expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
        total += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    total = tl.where(experts < num_experts, total, 0)
    tl.store(counts + chunk.to(tl.int64) * EXPERTS + experts, total)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _place_kernel(
    ids, counts, sorted_pairs, tiles, num_tiles, num_pairs, num_experts, num_chunks,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    # 1. Pairs of each expert: all, and those of earlier chunks.
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    earlier = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, num_chunks, STEP):
        index = start + tl.arange(0, STEP)
        at = counts + index[:, None].to(tl.int64) * EXPERTS + experts[None, :]
        count = tl.load(at, mask=(index < num_chunks)[:, None], other=0)
        total += tl.sum(count, 0)
        earlier += tl.sum(tl.where((index < chunk)[:, None], count, 0), 0)
    first_place = tl.cumsum(total, 0) - total

    # 2. The places of this chunk's pairs.
    place_of_next = first_place + earlier
    for start in range(0, CHUNK, STEP):
        pair = chunk * CHUNK + start + tl.arange(0, STEP)
        expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
        is_expert = (expert >= 0) & (expert < num_experts)
        chosen = ((expert[:, None] == experts[None, :]) & is_expert[:, None]).to(tl.int32)
        places = chosen * (place_of_next[None, :] + tl.cumsum(chosen, 0) - 1)
        tl.store(sorted_pairs + tl.sum(places, 1), pair, mask=is_expert)
        place_of_next += tl.sum(chosen, 0)

    # 3. One program lists the tiles, expert by expert.
    if chunk == 0:
        needed = (total + (TOKENS - 1)) // TOKENS
        first_tile = tl.cumsum(needed, 0) - needed
        tl.store(num_tiles, tl.sum(needed, 0))
        for index in range(tl.max(needed, 0)):
            exists = index < needed
            at = tiles + (first_tile + index) * 3
            done = index * TOKENS
            tl.store(at, experts, mask=exists)
            tl.store(at + 1, first_place + done, mask=exists)
            tl.store(at + 2, tl.minimum(total - done, TOKENS), mask=exists)


def list_tiles(expert_ids: torch.Tensor, num_experts: int, tokens: int) -> TileLists:
    """Tiles of at most ``tokens`` pairs of one expert each, for ids int32 [T, top_k]."""
    num_pairs, device = expert_ids.numel(), expert_ids.device
    padded = power_of_two(num_experts)
    chunks = triton.cdiv(num_pairs, CHUNK_PAIRS)
    bound = num_pairs // tokens + min(num_experts, num_pairs)  # each expert has at most one that is not full
    counts = torch.empty(chunks, padded, dtype=torch.int32, device=device)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=device)
    tiles = torch.empty(bound, 3, dtype=torch.int32, device=device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=device)
    sizes = {"CHUNK": CHUNK_PAIRS, "STEP": sort_step(padded, CHUNK_PAIRS), "EXPERTS": padded}
    _count_kernel[(chunks,)](expert_ids, counts, num_pairs, num_experts, **sizes)
    _place_kernel[(chunks,)](
        expert_ids, counts, pairs, tiles, num_tiles, num_pairs, num_experts, chunks, TOKENS=tokens, **sizes
    )
    return TileLists(pairs, tiles, num_tiles)


# --- ahead of time ------------------------------------------------------------------------------------------


def _aot_cases() -> Iterator[AotCase]:
    for num_experts in (128, 8, 512):
        sizes = {"CHUNK": CHUNK_PAIRS, "STEP": sort_step(num_experts, CHUNK_PAIRS), "EXPERTS": num_experts}
        numbers = {"num_pairs": "i32", "num_experts": "i32"}
        constants = dict.fromkeys(sizes, "constexpr")
        pointers = {"ids": "*i32", "counts": "*i32"}
        yield AotCase(
            f"{num_experts} experts", _count_kernel, pointers | numbers | constants, sizes, 4, 3,
            tuple(pointers),
        )  # fmt: skip
        pointers |= {"sorted_pairs": "*i32", "tiles": "*i32", "num_tiles": "*i32"}
        signature = pointers | numbers | {"num_chunks": "i32", "TOKENS": "constexpr"} | constants
        yield AotCase(
            f"{num_experts} experts", _place_kernel, signature, sizes | {"TOKENS": 64}, 4, 3, tuple(pointers)
        )


AOT_CASES = tuple(_aot_cases())
