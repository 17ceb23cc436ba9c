"""Paged attention and cache writes: float64 truth; tokens do not depend on chunks, blocks or neighbours."""

import pytest
import torch
from kernels.oracle import EPS, SAFETY, SUBNORMAL, assert_within

from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu, reference
from moe_runtime.kernels.cache_rows import CACHE_DTYPES, dequantize_rows, quantize_rows, row_size

# query heads, key heads, key width, value width (None: values are the first columns of the keys), block size
SHAPES = {
    "gqa": (8, 2, 128, 128, 16),
    "mha": (4, 4, 64, 64, 32),
    "odd": (6, 2, 20, 12, 8),
    "mla": (20, 1, 72, None, 16),
    "mla_wide": (16, 1, 576, None, 32),
}
MLA_VALUES = {"mla": 56, "mla_wide": 512}


class World:
    """Sequences of given lengths in shuffled blocks of one cache."""

    def __init__(
        self, shape: str, lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        heads, kv_heads, key_dim, value_dim, block_size = SHAPES[shape]
        torch.manual_seed(seed)
        self.block_size, self.scale = block_size, key_dim**-0.5
        per_sequence = max(-(-length // block_size) for length in lengths)
        num_blocks = len(lengths) * per_sequence + 2
        self.keys = rows_of(torch.randn(num_blocks, kv_heads, block_size, key_dim), dtype)
        self.values = None
        if value_dim is not None:
            self.values = rows_of(torch.randn(num_blocks, kv_heads, block_size, value_dim), dtype)
        self.value_dim = value_dim or MLA_VALUES[shape]
        tables = torch.randperm(num_blocks)[: len(lengths) * per_sequence]
        self.tables = tables.view(len(lengths), per_sequence).int()
        self.positions = torch.cat([torch.arange(length) for length in lengths]).int()
        self.rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
        self.q = torch.randn(len(self.rows), heads, key_dim)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        return cpu.attention(
            self.q[tokens], self.keys, self.values, self.positions[tokens], self.rows[tokens], self.tables,
            self.scale, self.value_dim,
        )  # fmt: skip

    def truth(self, tokens: torch.Tensor) -> torch.Tensor:
        return reference.attention(
            self.q[tokens].double(), self.keys, self.values, self.positions[tokens], self.rows[tokens],
            self.tables, self.scale, self.value_dim,
        )  # fmt: skip

    def bound(self, tokens: torch.Tensor, isa: str) -> torch.Tensor:
        """Scores err by at most d each, so a probability by a factor within e^(2d); the rest is rounding."""
        dot = isa in ("avx512bf16", "amx") and self.keys.dtype is not torch.float32
        # Queries and probabilities are rounded to bf16, and rows of an int8 cache once more when widened.
        rounded = 2.0**-9 * dot
        widened = 2.0**-9 * (dot and self.keys.dtype is torch.int8)
        key_dim = self.q.shape[-1]
        out = torch.zeros(len(tokens), self.q.shape[1], self.value_dim, dtype=torch.float64)
        for i, token in enumerate(tokens.tolist()):
            keys, values = self.seen_by(token)
            groups = self.q[token].double().view(len(keys), -1, key_dim)
            probabilities = (groups @ keys.transpose(1, 2) * self.scale).softmax(-1)
            relative = rounded + widened + SAFETY * key_dim**0.5 * EPS
            error = relative * self.scale * (groups.abs() @ keys.abs().transpose(1, 2)).amax(-1, keepdim=True)
            mass = (probabilities @ values.abs()).flatten(
                0, 1
            )  # at least |output| and mean |value - output| / 2
            rounding = 1.01 * (rounded + widened) + SAFETY * (keys.shape[1] ** 0.5 + 8) * EPS
            out[i] = (2 * torch.expm1(2 * error).flatten(0, 1) + rounding) * mass + SUBNORMAL
        return out

    def seen_by(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values float64 [kv_heads, length, D] that the token attends to."""
        length = int(self.positions[token]) + 1
        blocks = self.tables[self.rows[token], : -(-length // self.block_size)].long()

        def rows(cache: torch.Tensor, dim: int) -> torch.Tensor:
            found = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            if cache.dtype is torch.int8:
                return dequantize_rows(found, dim, torch.float64)
            return found.double()

        keys = rows(self.keys, self.q.shape[-1])
        if self.values is None:
            return keys, keys[..., : self.value_dim]
        return keys, rows(self.values, self.value_dim)


def rows_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return quantize_rows(values) if dtype is torch.int8 else values.to(dtype)


# One key; around one and two vectors, blocks and parts; many sequences; ragged.
LENGTHS = ([1], [2, 1, 33], [15, 16, 17], [255, 256, 257], [513], [1] * 40)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_within_the_error_bound(isa: str, shape: str, dtype: torch.dtype) -> None:
    for lengths in LENGTHS:
        world = World(shape, lengths, dtype)
        ends = torch.tensor(lengths).cumsum(0) - 1
        tokens = torch.cat(
            (torch.arange(len(world.rows))[:: max(1, len(world.rows) // 8)], ends[:8])
        ).unique()
        assert_within(world.run(tokens), world.truth(tokens), world.bound(tokens, isa))


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_is_the_same_bits_in_any_chunk_and_company(isa: str, shape: str, dtype: torch.dtype) -> None:
    world = World(shape, [280, 20, 530], dtype)
    whole = world.run(torch.arange(830))
    for chunk in (1, 3, 16, 100):
        tokens = torch.arange(700, 830)
        parts = [world.run(part) for part in tokens.split(chunk)]
        assert torch.equal(torch.cat(parts), whole[tokens])
    for size in (1, 2, 15, 40):
        tokens = torch.randperm(830)[:size]
        assert torch.equal(world.run(tokens), whole[tokens])


def test_the_block_size_changes_no_bit(isa: str) -> None:
    torch.manual_seed(1)
    keys, values, q = torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64), torch.randn(3, 4, 64)
    positions, rows = torch.tensor([511, 300, 7]).int(), torch.zeros(3).int()
    results = []
    for block_size in (8, 16, 64, 512):
        tables = torch.arange(512 // block_size).int().unsqueeze(0)
        paged = [c.view(2, -1, block_size, 64).transpose(0, 1).contiguous() for c in (keys, values)]
        results.append(cpu.attention(q, *paged, positions, rows, tables, 0.125))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["gqa", "mla"])
def test_the_number_of_threads_changes_no_bit(
    isa: str, shape: str, dtype: torch.dtype, threads: None
) -> None:
    world = World(shape, [900, 40], dtype)
    results = []
    for count in (1, 2, 3, 7):
        cpu.set_num_threads(count)
        results.append((world.run(torch.tensor([899])), world.run(torch.arange(940))))
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_what_a_token_may_not_see_cannot_reach_it(isa: str, dtype: torch.dtype) -> None:
    """Future positions of the same tile hold NaN and Inf."""
    world = World("gqa", [40], dtype)
    clean = world.run(torch.arange(40))
    assert world.values is not None
    for position in range(20, 40):
        block, offset = int(world.tables[0, position // 16]), position % 16
        strange = torch.full((2, 128), torch.inf if position % 2 else torch.nan)
        world.keys[block, :, offset] = rows_of(strange, dtype)
        world.values[block, :, offset] = rows_of(torch.full((2, 128), torch.nan), dtype)
    dirty = world.run(torch.arange(40))
    assert torch.equal(dirty[:20], clean[:20]) and dirty[20:].isnan().all()


def test_large_scores_do_not_overflow(isa: str) -> None:
    world = World("mha", [300])
    world.q *= 1e4
    tokens = torch.arange(0, 300, 7)
    got = world.run(tokens)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), world.truth(tokens), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_written_values_are_rounded_once_and_land_in_their_slot(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    for dim in (1, 7, 16, 33, 64, 72, 128, 576):
        values = torch.randn(9, 3, dim) * torch.logspace(-40, 38, 9).view(9, 1, 1)
        values[4, 1, 0], values[5, 0, 0], values[6, 2, 0] = torch.nan, torch.inf, -0.0
        slots = torch.randperm(6 * 8)[:9]
        got = torch.zeros(6, 3, 8, row_size(dim, dtype), dtype=dtype)
        expected = torch.zeros_like(got)
        cpu.write_cache(got, values, slots)
        reference.write_cache(expected, values, slots)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_int8_codes_are_the_nearest_ones() -> None:
    """Within half a step of a 127th of the largest of 64; a group of zeros or near zeros is zero."""
    torch.manual_seed(3)
    values = torch.randn(50, 2, 200) * torch.logspace(-12, 12, 50).view(50, 1, 1)
    values[7] = 0.0
    values[8] = 1e-31
    rows = torch.zeros(50, 2, 1, row_size(200, torch.int8), dtype=torch.int8)
    cpu.write_cache(rows, values, torch.arange(50))
    read = dequantize_rows(rows[:, :, 0], 200, torch.float64)
    for group, exact in zip(read.split(64, -1), values.double().split(64, -1), strict=True):
        largest = exact.abs().amax(-1, keepdim=True)
        assert ((group - exact).abs() <= largest * (0.5 / 127 + 4 * EPS) + 1e-30).all()
    assert not read[7:9].any()


def test_of_two_tokens_in_one_slot_the_last_is_kept(isa: str, threads: None) -> None:
    """Also when heads are written by different threads."""
    torch.manual_seed(4)
    values, slots = torch.randn(600, 4, 64), torch.arange(600) % 32
    for count in (1, 2, 7):
        cpu.set_num_threads(count)
        cache = torch.zeros(2, 4, 16, 64)
        cpu.write_cache(cache, values, slots)
        last = values[-32:].roll(600 % 32, 0).view(2, 16, 4, 64).transpose(1, 2)
        assert torch.equal(cache, last)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("positions", -1, r"positions\[2\] = -1"),
        ("positions", 10**6, r"positions\[2\] = 1000000, expected 0 <= value < 48"),
        ("rows", 1, r"sequence_rows\[2\] = 1, expected 0 <= value < 1"),
        ("tables", 99, r"block_tables\[0\]\[2\] = 99"),
        ("tables", -1, r"block_tables\[0\]\[2\] = -1"),
    ],
)
def test_indices_out_of_range_are_refused(field: str, value: int, message: str) -> None:
    world = World("gqa", [40])
    getattr(world, field).view(-1)[2] = value
    with pytest.raises(KernelError, match=f"attention: {message}"):
        world.run(torch.arange(40))


@pytest.mark.parametrize("slot", [-1, 32, 2**40])
def test_a_slot_out_of_range_is_refused(slot: int) -> None:
    slots = torch.tensor([0, slot])
    with pytest.raises(KernelError, match=rf"write_cache: slots\[1\] = {slot}, expected 0 <= slot < 32"):
        cpu.write_cache(torch.zeros(4, 1, 8, 4), torch.zeros(2, 1, 4), slots)


def test_no_heads_and_empty_heads_are_refused() -> None:
    places = (torch.zeros(1).int(), torch.zeros(1).int(), torch.zeros(1, 1).int())
    for heads, dim, message in ((0, 8, "a multiple of 1 heads"), (1, 0, "at least one number")):
        cache = torch.zeros(1, 1, 16, dim)
        with pytest.raises(KernelError, match=message):
            cpu.attention(torch.zeros(1, heads, dim), cache, cache, *places, 1.0)
