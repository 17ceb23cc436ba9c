"""One operation as bench/gpu.py measures it, and the sizes of the layers that operations are taken from."""

from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_clock import Call, Clock


@dataclass(frozen=True)
class Work:
    """Calls over rotating inputs, what one of them moves and computes, and the same by torch."""

    calls: list[Call]
    num_bytes: float
    operations: float
    peers: dict[str, list[Call]] = field(default_factory=dict)
    error: Callable[[], float] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table. ``build`` makes its inputs on the clock's device."""

    op: str
    shape: str
    format: str
    tokens: int
    build: Callable[[Clock], Work]


@dataclass(frozen=True)
class Sizes:
    """Of the operations: those of Qwen3-30B-A3B's layer, and of DeepSeek-V2-Lite's latent attention."""

    linears: tuple[tuple[str, int, int], ...]  # name, N, K
    heads: int
    kv_heads: int
    head_dim: int
    latent: tuple[int, int, int]  # heads, key width, value width
    hidden: int
    experts: int
    top_k: int
    block_size: int
    tokens: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]  # sequences, length of each
    prefill: tuple[int, ...]


SIZES = Sizes(
    (("qkv", 5120, 2048), ("out", 2048, 4096), ("lm_head", 151936, 2048)), 32, 4, 128, (16, 576, 512), 2048,
    128, 8, 16, (1, 16, 128, 4096), ((1, 4096), (16, 1024), (64, 1024), (8, 16384)), (2048,),
)  # fmt: skip
TOY_SIZES = Sizes(
    (("qkv", 96, 64),), 4, 2, 16, (2, 24, 16), 64, 8, 2, 4, (1, 20), ((1, 9), (3, 6)), (6,)
)  # fmt: skip
