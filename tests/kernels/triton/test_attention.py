"""Triton attention against the literal one in float64, over shuffled blocks that hold garbage elsewhere; and
bit against bit: whatever shares a token's batch, chunk or block changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from kernels.triton.device_weights import use_exact_dot

from moe_runtime.errors import KernelError
from moe_runtime.kernels import reference
from moe_runtime.kernels.cache_rows import quantize_rows, row_size

pytest.importorskip("triton")
from moe_runtime.kernels.triton import attention as module  # noqa: E402
from moe_runtime.kernels.triton.attention import attention  # noqa: E402
from moe_runtime.kernels.triton.tiles import ATTENTION_SPLIT  # noqa: E402

# What queries, keys and values are rounded to before they are multiplied.
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.int8: 2.0**-8}
SHAPES = {  # query heads, key heads, key width, value width, whether the keys hold the values
    "mha": (2, 2, 16, 16, False),
    "gqa": (4, 2, 32, 32, False),
    "odd": (3, 1, 24, 20, False),
    "latent": (4, 1, 40, 32, True),
    "latent, values read twice": (2, 1, 48, 40, True),
    "latent of many scales": (2, 1, 272, 256, True),
}
CASES = [
    (shape, dtype)
    for shape in SHAPES
    for dtype in EPS
    if dtype in (torch.bfloat16, torch.int8) or shape in ("gqa", "odd")
]
ONE_EACH = list(zip(SHAPES, [*EPS, torch.bfloat16, torch.int8], strict=True))
Rows = Sequence[tuple[int, int]]  # (sequence, position) of each token


@dataclass
class World:
    """Sequences of ``lengths`` tokens, their blocks shuffled; whatever belongs to nobody is NaN."""

    shape: str
    lengths: list[int]
    dtype: torch.dtype
    block_size: int = 16
    broken: list[tuple[int, int]] = field(default_factory=list)  # whose values are infinite

    def __post_init__(self) -> None:
        self.heads, kv_heads, self.key_dim, self.value_dim, is_latent = SHAPES[self.shape]
        generator = torch.Generator().manual_seed(sum(self.lengths))
        counts = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(counts) + 2, generator=generator).int()
        self.tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        start = 0
        for row, count in enumerate(counts):
            self.tables[row, :count] = order[start : start + count]
            start += count
        # The same numbers for every size of blocks.
        dense = torch.Generator().manual_seed(7)
        shape = (len(self.lengths), max(self.lengths))
        keys = torch.randn(*shape, kv_heads, self.key_dim, generator=dense)
        values = torch.randn(*shape, kv_heads, self.value_dim, generator=dense)
        self.queries = torch.randn(*shape, self.heads, self.key_dim, generator=dense)
        for place in self.broken:
            (keys if is_latent else values)[place][..., 1] = torch.inf
        self.keys = self._paged(keys, len(order))
        self.values = None if is_latent else self._paged(values, len(order))

    def _paged(self, rows: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """rows [sequences, positions, Hkv, D] in their blocks."""
        shape = (num_blocks, rows.shape[2], self.block_size, row_size(rows.shape[3], self.dtype))
        if self.dtype is torch.int8:
            cache, stored = torch.full(shape, -1, dtype=torch.int8), quantize_rows(rows)  # scales are NaN
        else:
            cache, stored = torch.full(shape, torch.nan, dtype=self.dtype), rows.to(self.dtype)
        for sequence, length in enumerate(self.lengths):
            for place in range(length):
                block, at = divmod(place, self.block_size)
                cache[int(self.tables[sequence, block]), :, at] = stored[sequence, place]
        return cache

    def run(self, rows: Rows, device: torch.device) -> torch.Tensor:
        q, *tensors = self._arguments(rows)
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return attention(q.to(device), *moved, self.key_dim**-0.5, self.value_dim).cpu()

    def truth(self, rows: Rows) -> torch.Tensor:
        q, *tensors = self._arguments(rows)
        if self.dtype is not torch.float32:
            q = q.to(torch.bfloat16 if self.dtype is torch.int8 else self.dtype)
        return reference.attention(q.double(), *tensors, self.key_dim**-0.5, self.value_dim)

    def _arguments(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None, *tuple[torch.Tensor, ...]]:
        """A query depends on its (sequence, position) alone."""
        sequences = torch.tensor([row for row, _ in rows], dtype=torch.int32)
        positions = torch.tensor([place for _, place in rows], dtype=torch.int32)
        q = self.queries[sequences.long(), positions.long()]
        return q, self.keys, self.values, positions, sequences, self.tables

    @property
    def largest_value(self) -> float:
        return 4.5  # of the normal numbers drawn above


def last_tokens(world: World) -> Rows:
    return [(row, length - 1) for row, length in enumerate(world.lengths)]


def all_tokens(world: World) -> Rows:
    return [(row, place) for row, length in enumerate(world.lengths) for place in range(length)]


@pytest.fixture(params=[1, 3], ids=["each merges its splits", "splits are shared"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both ways to go through the splits, whatever the sizes would choose."""
    number: int = request.param
    monkeypatch.setattr(module, "attention_shares", lambda programs, splits, size: min(number, splits))
    return number


# --- truth --------------------------------------------------------------------------------------------------


def check(world: World, rows: Rows, device: torch.device) -> None:
    """Values are averages of standard normal numbers: each weight and sum is rounded a few times."""
    got, expected = world.run(rows, device), world.truth(rows)
    assert got.shape == expected.shape and torch.isfinite(got).all()
    assert (got.double() - expected).abs().max() <= 16 * EPS[world.dtype] * world.largest_value


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_a_step_of_decoding_is_within_the_error_bound(
    shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    world = World(shape, [1, 15, 17], dtype)
    check(world, last_tokens(world), device)


@pytest.mark.parametrize(("shape", "dtype"), ONE_EACH, ids=str)
def test_whole_texts_are_within_the_error_bound(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    world = World(shape, [1, 15, 17], dtype)
    check(world, all_tokens(world), device)


def test_splits_of_long_texts_are_merged(shares: int, device: torch.device) -> None:
    world = World("odd", [2 * ATTENTION_SPLIT + 8, ATTENTION_SPLIT, ATTENTION_SPLIT + 1], torch.float32)
    rows = last_tokens(world)
    error = (world.run(rows, device).double() - world.truth(rows)).abs().max()
    assert error <= 64 * EPS[torch.float32] * world.largest_value


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), [("odd", torch.bfloat16), ("latent", torch.int8)])
def test_a_token_has_the_same_bits_alone_in_any_chunk_and_in_any_company(
    shape: str, dtype: torch.dtype, shares: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of a few tokens slide over the ends of a tile and of a split, alone and among strangers."""
    use_exact_dot(monkeypatch, device)
    world = World(shape, [ATTENTION_SPLIT + 4, 3, 40], dtype)
    for end in (64, ATTENTION_SPLIT):
        watched = [(0, place) for place in range(end - 2, end + 2)]
        alone = torch.cat([world.run([row], device) for row in watched])
        assert torch.equal(world.run(watched, device), alone)
        for first in (0, 2):
            window = watched[first : first + 2]
            company = [(1, 2), *window, (2, 39), (1, 0), (2, 15), (2, 16)]
            assert torch.equal(world.run(company, device)[1:3], alone[first : first + 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_no_size_of_blocks_changes_a_bit(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [1, 33, 20]
    worlds = [World("odd", lengths, dtype, block_size) for block_size in (16, 1, 3, 128)]
    for rows in (last_tokens(worlds[0]), [(1, place) for place in range(28, 33)]):
        results = [world.run(rows, device) for world in worlds]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", EPS, ids=lambda dtype: str(dtype)[6:])
def test_a_first_token_gets_its_own_value(dtype: torch.dtype, shares: int, device: torch.device) -> None:
    """Nothing before it: the only weight is 1. Among tokens that see more, too."""
    world = World("gqa", [20, 2], dtype)
    own = world.truth([(0, 0)])
    own = own.bfloat16() if dtype is torch.int8 else own
    for rows in ([(0, 0)], [(0, 0), (0, 1), (0, 19), (1, 1)]):
        assert torch.equal(world.run(rows, device)[0].double(), own[0].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_an_infinite_value_reaches_those_who_see_it_alone(
    dtype: torch.dtype, shares: int, device: torch.device
) -> None:
    rows = [(0, place) for place in range(14, 20)] + [(1, 9)]
    clean = World("gqa", [20, 10], dtype).run(rows, device)
    broken = World("gqa", [20, 10], dtype, broken=[(0, 17)]).run(rows, device)
    blind = [0, 1, 2, 6]
    assert torch.equal(broken[blind], clean[blind])
    assert not broken[3:6, :, 1].isfinite().any()


# --- what is not there --------------------------------------------------------------------------------------


def test_no_tokens_and_padding_tokens(device: torch.device) -> None:
    cache = torch.full((2, 1, 16, 16), float("nan"), device=device)
    places = torch.zeros(1, 1, dtype=torch.int32, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    nothing = attention(torch.zeros(0, 2, 16, device=device), cache, cache, none, none, places, 1.0)
    assert nothing.shape == (0, 2, 16)
    padding = torch.tensor([-1], dtype=torch.int32, device=device)
    out = attention(torch.ones(1, 2, 16, device=device), cache, cache, padding, padding, places, 1.0)
    assert not out.any()


def test_padding_and_unknown_sequences_get_zeros_and_change_no_neighbour(
    shares: int, device: torch.device
) -> None:
    world = World("gqa", [20, 7], torch.bfloat16)
    q, *caches, positions, sequences, tables = world._arguments([(0, 19), (1, 6), (0, 3), (1, 0), (1, 5)])
    positions[2], sequences[3], sequences[4] = -1, -1, 2
    tensors = [part.to(device) for part in (q, *caches, positions, sequences, tables) if part is not None]
    out = attention(*tensors, world.key_dim**-0.5).cpu()
    assert torch.equal(out[:2], world.run([(0, 19), (1, 6)], device)) and not out[2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_blocks_that_the_cache_does_not_have_read_as_zeros(dtype: torch.dtype, device: torch.device) -> None:
    world, empty = World("mha", [40], dtype), World("mha", [40], dtype)
    missing = int(empty.tables[0, 1])
    for cache in (empty.keys, empty.values):
        assert cache is not None
        cache[missing] = 0
    for wrong in (-1, len(world.keys)):
        world.tables[0, 1] = wrong
        assert torch.equal(world.run([(0, 39)], device), empty.run([(0, 39)], device))


def test_positions_beyond_the_table_are_cut(device: torch.device) -> None:
    world = World("mha", [40], torch.float32)
    world.queries[0, 15] = world.queries[0, 39]
    expected = world.run([(0, 15)], device)
    world.tables = world.tables[:, :1].clone()
    assert torch.equal(world.run([(0, 39)], device), expected)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    one = torch.zeros(1, dtype=torch.int32, device=device)
    rest = (one, one, one.view(1, 1), 1.0)
    q, cache = torch.zeros(1, 1, 16, device=device), torch.zeros(1, 1, 16, 16, device=device)
    with pytest.raises(KernelError, match=r"k_cache is torch.int8 \[1, 1, 16, 16\], expected .* 16, 20\]"):
        attention(q, cache.to(torch.int8), cache.to(torch.int8), *rest)
    with pytest.raises(KernelError, match="v_cache is torch.bfloat16"):
        attention(q, cache, cache.bfloat16(), *rest)
    with pytest.raises(KernelError, match="v_dim is 17, expected at most 16"):
        attention(q, cache, None, *rest, 17)
    with pytest.raises(KernelError, match="scale is 0.0, expected a finite number above 0"):
        attention(q, cache, cache, one, one, one.view(1, 1), 0.0)
