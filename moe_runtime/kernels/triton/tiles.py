"""Every tile size, warp count and pipeline depth of the Triton kernels, by operation.

They follow from the shapes of weights alone, never from how many tokens there are where a token's bits would
depend on it: a sum taken in another order is another number. None has been tuned on a GPU yet; what changes
no bit, ``Tile``, a user may have measured (moe_runtime/autotune.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` (and 1)."""
    return 1 << max(size - 1, 0).bit_length()


# --- router -------------------------------------------------------------------------------------------------

MAX_EXPERTS = 1024  # the whole row of one token is held in registers
BLOCK_TOKENS = 16  # the smallest side of a matrix instruction; so many share one read of the weight
TOKENS_PER_LAUNCH = 1024  # bounds the scratch memory of one; more tokens are more launches


def rows_per_program(padded_experts: int) -> int:
    """Tokens of one program of 4 warps that starts from logits: a warp each, up to 8 experts per thread, so
    that the usual 128 or 256 experts need no barrier.
    """
    return min(max(1024 // padded_experts, 1), 4)


@dataclass(frozen=True)
class RouterTiles:
    """The router's matrix product is cut into pieces of [block_experts, split_k] of its weight, one program
    each, so that even one token has the whole weight read by many processors at once.
    """

    block_experts: int
    block_k: int
    split_k: int
    rows: int  # tokens that the last program of a block of tokens routes side by side
    num_warps: int
    num_stages: int


def router_tiles(padded_experts: int) -> RouterTiles:
    """2048 scores side by side are 16 per thread, and fit its registers."""
    rows = min(BLOCK_TOKENS, max(2048 // padded_experts, 1))
    return RouterTiles(block_experts=16, block_k=128, split_k=512, rows=rows, num_warps=4, num_stages=3)


# --- norms --------------------------------------------------------------------------------------------------

MAX_NORM_DIM = 65536  # the whole row is held in registers


def norm_tiles(padded_dim: int) -> tuple[int, int]:
    """(rows per program, warps). Short rows, those of single heads, share a program, some to each warp."""
    return max(1024 // padded_dim, 1), min(max(padded_dim // 512, 4), 32)


# --- positions and cache rows -------------------------------------------------------------------------------


def heads_per_program(num_heads: int, padded_dim: int) -> int:
    """Of one token: at most 2048 numbers, 16 per thread of 4 warps."""
    return min(power_of_two(num_heads), max(2048 // padded_dim, 1))


# --- matrix products (linear, experts) ----------------------------------------------------------------------

# How much of K one step of the inner loop takes, by the kind of weights. With it goes the order of every sum:
# it must not depend on anything else. Rows of weights are padded to it.
_BLOCK_K = {"float32": 32, "bfloat16": 64, "float16": 64, "int8": 128, "int4": 128, "float8": 128}


def block_k(kind: str) -> int:
    return _BLOCK_K[kind]


@dataclass(frozen=True)
class Tile:
    """One program multiplies ``rows`` rows of weights (at least 64, so that Hopper uses the same instruction
    for every number of tokens) with ``tokens`` rows of activations. Changes no bit of a result.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    per_processor: int  # programs that a processor has room for


def _by_tokens(*tiles: Tile) -> dict[int, Tile]:
    return {tile.tokens: tile for tile in tiles}


# Few tokens: bytes in flight decide, so 64 rows and a deep pipeline. Many: arithmetic does, so large tiles.
_PLAIN_TILES = _by_tokens(
    Tile(64, 16, 4, 5, 3), Tile(64, 32, 4, 4, 3), Tile(128, 64, 8, 3, 2), Tile(128, 128, 8, 3, 2)
)
_INT8_TILES = _by_tokens(
    Tile(64, 16, 4, 4, 3), Tile(64, 32, 4, 3, 3), Tile(64, 64, 8, 2, 2), Tile(128, 128, 8, 2, 2)
)
# With scales inside the loop a step's products need registers of their own, beside the sum. So half the rows:
# a weight is still widened once for 128 tokens.
_SCALED_TILES = _by_tokens(
    Tile(64, 16, 4, 4, 3), Tile(64, 32, 4, 3, 3), Tile(64, 64, 8, 2, 2), Tile(64, 128, 8, 2, 2)
)
_FLOAT_TILES = _by_tokens(Tile(64, 16, 4, 3, 4), Tile(64, 32, 4, 3, 4), Tile(64, 64, 8, 2, 2))
_TILES = {
    "float32": _FLOAT_TILES,
    "bfloat16": _PLAIN_TILES,
    "float16": _PLAIN_TILES,
    "int8": _INT8_TILES,
    "int4": _SCALED_TILES,
    "float8": _SCALED_TILES,
}


def matrix_tile(kind: str, tokens: int) -> Tile:
    """The smallest that holds ``tokens`` rows, or the largest."""
    table = _TILES[kind]
    return table[min(max(power_of_two(tokens), 16), max(table))]


def matrix_tiles(kind: str) -> tuple[Tile, ...]:
    return tuple(_TILES[kind].values())


# A tile, and whether segments of K are programs of their own (of dense layers).
Choice: TypeAlias = tuple[Tile, bool]
TUNED_SIZES = (16, 64, 256, 1024, 4096)


def tuned_size(count: int) -> int:
    """Which measurement counts for so many rows, or pairs of token and expert: of the next larger size."""
    return next((size for size in TUNED_SIZES if size >= count), TUNED_SIZES[-1])


def candidates(kind: str, size: int) -> tuple[Tile, ...]:
    """Worth measuring for ``size`` rows or pairs: the tiles above, pipelines one stage more or less deep."""
    fitting = [tile for tile in matrix_tiles(kind) if tile.tokens <= size]
    return tuple(
        replace(tile, num_stages=tile.num_stages + more)
        for tile in fitting
        for more in (-1, 0, 1)
        if tile.num_stages + more >= 2
    )


def launch_options(tile: Tile) -> dict[str, int]:
    """AMD's compiler would otherwise choose its matrix instruction, and with it the order of sums, by the
    shape of the tile.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | ({"matrix_instr_nonkdim": 16} if torch.version.hip else {})


ELEMENTS_PER_PROGRAM = 1024  # of elementwise kernels
PROCESSORS = 132  # of the GPU that these numbers were made for, an H100
ROWS_TO_CAST = 64  # above so many, activations are rounded once beforehand instead of by each program
SEGMENTS_MAX = 8


def linear_segments(n: int, padded_k: int, kind: str) -> int:
    """Into how many parts the sum over K of a dense layer is cut: so many that a small matrix, read for one
    token, keeps all processors busy. A part is at least 4 steps of the inner loop.
    """
    programs, steps, segments = -(-n // 64), padded_k // block_k(kind), 1
    while (
        programs * segments < PROCESSORS * 3 // 4
        and segments < SEGMENTS_MAX
        and steps % (segments * 2) == 0
        and steps // (segments * 2) >= 4
    ):
        segments *= 2
    return segments


def segment_tiles(kind: str) -> tuple[Tile, ...]:
    """For one program that computes segments one after the other: it keeps two sums in registers, and where
    int8 is widened in them there is room for half the rows.
    """
    rows = 64 if kind == "int8" else 128
    return tuple(replace(tile, rows=min(tile.rows, rows)) for tile in matrix_tiles(kind))


def linear_tile(kind: str, rows: int, n: int, segments: int) -> tuple[Tile, bool]:
    """The largest tile that leaves no half of the processors idle, else the smallest; and whether segments
    have to be programs of their own for that.
    """
    tiles = segment_tiles(kind) if segments > 1 else matrix_tiles(kind)
    for tile in sorted(tiles, key=lambda tile: -tile.tokens):
        programs = -(-n // tile.rows) * -(-rows // tile.tokens)
        fits = tile.tokens <= matrix_tile(kind, rows).tokens
        for split in (False, True):
            if fits and programs * (segments if split else 1) >= PROCESSORS // 2:
                return tile, split and segments > 1
    return matrix_tile(kind, 1), segments > 1


# --- experts ------------------------------------------------------------------------------------------------

SMALL_PAIRS = 64  # (token, expert) pairs up to which every program finds its tokens in the ids by itself
FEW_TOKENS = 32  # at most, of SMALL_PAIRS, share an expert where every token has two experts or more
GROUP_TILES = 8  # tiles of tokens that run side by side over the same rows of weights, for the L2 cache
CHUNK_PAIRS = 256  # of the sort: pairs that one program counts and places
COMBINE_COLUMNS = 1024


def expert_tile(kind: str, pairs: int, num_experts: int) -> Tile:
    """Twice the mean number of tokens per expert: most experts' weights are then read once."""
    return matrix_tile(kind, min(2 * pairs // num_experts, FEW_TOKENS if pairs <= SMALL_PAIRS else pairs))


def sort_step(padded_experts: int, chunk: int) -> int:
    """Pairs of a chunk that are compared with all experts at once: 4096 comparisons, 32 per thread."""
    return min(max(4096 // padded_experts, 4), chunk)


# --- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTiles:
    """All of it decides bits: the same for one token and for thousands."""

    block_rows: int  # queries that share one read of keys and values
    block_positions: int
    split: int  # positions that are summed from a fresh state
    num_warps: int  # on NVIDIA
    num_stages: int
    hip_warps: int = 4
    decode_registers: int = 255

    def registers(self, one_token: bool) -> int:
        """Per thread, at most. NVIDIA's assembler has to be told: left to itself it spills some of them where
        that makes room for one more program, which the shared memory of these has no room for.
        """
        return self.decode_registers if one_token else 255

    def launch_options(self, one_token: bool) -> dict[str, int]:
        if torch.version.hip:
            return {"num_warps": self.hip_warps, "num_stages": self.num_stages}
        limits = {"maxnreg": self.registers(one_token)}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limits


ATTENTION_SPLIT = 256  # short: one token's text of a few thousand positions keeps many processors busy
ATTENTION_PROGRAMS = 1024  # enough for every GPU; fewer tiles than that share their splits
ATTENTION_SCRATCH = 1 << 28  # bytes that shared splits may take
ATTENTION_SEQUENCES = 8  # programs that share the sequences of one tile of tokens


def attention_tiles(itemsize: int, key_width: int, value_width: int) -> AttentionTiles:
    """By bytes per cached number and padded widths. 32 rows are what registers have room for on sm_80. Wide
    heads, latents and float32, which has no matrix instruction, have less; int8 is widened in registers, so
    that more warps share a tile (not on AMD, where 512 threads would have half the registers each). Three
    stages: the block table's entry, keys and values, their use. Five: the next keys and values are under way
    meanwhile; 32 positions then take as much shared memory as 64 in three, and sm_80 has room for 3 programs.
    """
    if itemsize == 4:
        return AttentionTiles(16, 16, ATTENTION_SPLIT, num_warps=4, num_stages=1)
    if max(key_width, value_width) > 128:
        return AttentionTiles(16, 32, ATTENTION_SPLIT, num_warps=8 if itemsize == 1 else 4, num_stages=3)
    if itemsize == 1:
        return AttentionTiles(32, 64, ATTENTION_SPLIT, num_warps=8, num_stages=3)
    return AttentionTiles(32, 32, ATTENTION_SPLIT, num_warps=4, num_stages=5, decode_registers=168)


def attention_shares(programs: int, num_splits: int, bytes_per_split: int) -> int:
    """Programs among which the splits of each of ``programs`` tiles are shared; 1: each merges its own."""
    if num_splits * bytes_per_split > ATTENTION_SCRATCH:
        return 1
    return min(max(ATTENTION_PROGRAMS // max(programs, 1), 1), num_splits)


def two_widths(dim: int) -> tuple[int, int]:
    """A width as a power of two and what is left, padded to one (0: nothing). The first comes in halves, and
    16 is the least width of a matrix instruction's operand.
    """
    main = max(1 << (dim.bit_length() - 1), 32)
    return main, max(power_of_two(dim - main), 16) if dim > main else 0


# --- sampling -----------------------------------------------------------------------------------------------

SAMPLING_WARPS = 16  # a row of a vocabulary is read by one program: as much of it at once as possible
SAMPLING_NEAR = 4096  # tokens near the best that are set aside; about a quarter is asked for
SAMPLING_LIST = 512  # entries of a list of penalties side by side
SAMPLING_VOCABULARIES = (151936, 259, 50257)  # compiled ahead of time: rows that are aligned, short, neither


def sampling_block(vocabulary: int) -> int:
    """Tokens side by side: 8 per thread, for more it has no registers. Decides the order of sums."""
    return min(power_of_two(vocabulary), 4096)
