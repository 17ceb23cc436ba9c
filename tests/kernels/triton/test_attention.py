"""Triton attention against the literal one in float64, over shuffled blocks that hold garbage elsewhere."""

from dataclasses import dataclass

import pytest
import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels import reference

pytest.importorskip("triton")
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = {  # query heads, key heads, key width, value width (None: the keys hold the values)
    "mha": (2, 2, 16, 16),
    "gqa": (8, 2, 32, 32),
    "odd": (6, 2, 24, 20),
    "latent": (4, 1, 40, None),
}
LATENT_VALUES = 32


@dataclass
class World:
    """Sequences of ``lengths`` tokens, their blocks shuffled; whatever belongs to nobody is NaN."""

    shape: str
    lengths: list[int]
    dtype: torch.dtype
    block_size: int = 16

    def __post_init__(self) -> None:
        heads, kv_heads, key_dim, value_dim = SHAPES[self.shape]
        generator = torch.Generator().manual_seed(sum(self.lengths))
        counts = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(counts) + 2, generator=generator).int()
        self.tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        self.v_dim = LATENT_VALUES if value_dim is None else None

        def cache(dim: int) -> torch.Tensor:
            rows = torch.randn(len(order), kv_heads, self.block_size, dim, generator=generator)
            return rows.to(self.dtype)

        self.keys = cache(key_dim)
        self.values = None if value_dim is None else cache(value_dim)
        unused = torch.ones(len(order), self.block_size, dtype=torch.bool)
        start = 0
        for row, (count, length) in enumerate(zip(counts, self.lengths, strict=True)):
            blocks = order[start : start + count]
            self.tables[row, :count] = blocks
            for place in range(length):
                unused[blocks[place // self.block_size], place % self.block_size] = False
            start += count
        for part in (self.keys, self.values):
            if part is not None:
                part.transpose(1, 2)[unused] = float("nan")
        self.heads, self.key_dim, self.generator = heads, key_dim, generator

    def tokens(self, rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, positions and sequences of (sequence, position) pairs; a query depends on its pair."""
        noise = torch.randn(len(self.lengths), max(self.lengths), self.heads, self.key_dim,
                            generator=torch.Generator().manual_seed(5))  # fmt: skip
        sequences = torch.tensor([row for row, _ in rows], dtype=torch.int32)
        positions = torch.tensor([place for _, place in rows], dtype=torch.int32)
        return noise[sequences.long(), positions.long()], positions, sequences

    def run(self, rows: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
        from moe_runtime.kernels.triton.attention import attention

        q, positions, sequences = self.tokens(rows)
        values = None if self.values is None else self.values.to(device)
        tensors = (self.keys.to(device), values, positions.to(device), sequences.to(device))
        out = attention(q.to(device), *tensors, self.tables.to(device), self.key_dim**-0.5, self.v_dim)
        return out.cpu()

    def truth(self, rows: list[tuple[int, int]]) -> torch.Tensor:
        q, positions, sequences = self.tokens(rows)
        if self.dtype is not torch.float32:
            q = q.to(self.dtype)
        tensors = (self.keys, self.values, positions, sequences)
        return reference.attention(q.double(), *tensors, self.tables, self.key_dim**-0.5, self.v_dim)


def last_tokens(world: World) -> list[tuple[int, int]]:
    return [(row, length - 1) for row, length in enumerate(world.lengths)]


def all_tokens(world: World) -> list[tuple[int, int]]:
    return [(row, place) for row, length in enumerate(world.lengths) for place in range(length)]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [last_tokens, all_tokens])
def test_every_shape_is_within_the_error_bound(
    rows: object, shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Values are averages of standard normal numbers: each weight and sum is rounded a few times."""
    world = World(shape, [1, 15, 17], dtype)
    chosen = rows(world)  # type: ignore[operator]
    got, expected = world.run(chosen, device), world.truth(chosen)
    assert got.shape == expected.shape and torch.isfinite(got).all()
    bound = 16 * EPS[dtype] * world_size(world)
    assert (got.double() - expected).abs().max() <= bound


def world_size(world: World) -> float:
    """The largest number in the cache that somebody owns."""
    values = world.keys if world.values is None else world.values
    return float(values.float().nan_to_num().abs().max())


def test_splits_of_long_texts_are_merged(device: torch.device) -> None:
    world = World("gqa", [600, 255, 256, 257], torch.float32)
    rows = last_tokens(world)
    error = (world.run(rows, device).double() - world.truth(rows)).abs().max()
    assert error <= 64 * EPS[torch.float32] * world_size(world)


def test_no_tokens_and_padding_tokens(device: torch.device) -> None:
    from moe_runtime.kernels.triton.attention import attention

    cache = torch.full((2, 1, 16, 16), float("nan"), device=device)
    places = torch.zeros(1, 1, dtype=torch.int32, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    nothing = attention(torch.zeros(0, 2, 16, device=device), cache, cache, none, none, places, 1.0)
    assert nothing.shape == (0, 2, 16)
    padding = torch.tensor([-1], dtype=torch.int32, device=device)
    out = attention(torch.ones(1, 2, 16, device=device), cache, cache, padding, padding, places, 1.0)
    assert not out.any()


def test_int8_rows_are_refused_with_the_knob(device: torch.device) -> None:
    from moe_runtime.kernels.triton.attention import attention

    cache = torch.zeros(1, 1, 16, 20, dtype=torch.int8, device=device)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match="--kv-dtype"):
        attention(torch.zeros(1, 1, 16, device=device), cache, cache, one, one, one.view(1, 1), 1.0)
