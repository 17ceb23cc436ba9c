"""Which rows bench/kernels.py has: layers of published models, weight formats, and a selection of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_runtime.kernels import WeightFormat


@dataclass(frozen=True)
class Layer:
    """The sizes of one decoder layer and of the vocabulary.

    ``key_dim`` is what one cached key holds per key head; with ``value_dim`` None the value is a part of it
    (MLA: 512 of 576). ``linear_in`` and ``linear_out`` are the [N, K] of attention's fused input projection
    and of its output projection.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    key_dim: int
    linear_in: tuple[int, int]
    linear_out: tuple[int, int]
    experts: int
    top_k: int
    intermediate: int
    vocabulary: int
    latent_value: int | None = None

    @property
    def rope_dim(self) -> int:
        return 64 if self.latent_value else self.key_dim


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3", 2048, 32, 4, 128, (5120, 2048), (2048, 4096), 128, 8, 768, 151936),
        Layer("olmoe", 2048, 16, 16, 128, (6144, 2048), (2048, 2048), 64, 8, 1024, 50304),
        Layer("deepseek", 2048, 16, 1, 576, (3648, 2048), (2048, 2048), 64, 6, 1408, 102400, 512),
        Layer("mixtral", 4096, 32, 8, 128, (6144, 4096), (4096, 4096), 8, 2, 14336, 32000),
    )
}
FORMATS = {
    "bf16": WeightFormat("bfloat16"),
    "int8": WeightFormat("int8"),
    "int4-g128": WeightFormat("int4", 128),
    "int4-g32": WeightFormat("int4", 32),
    "int4-g128z": WeightFormat("int4", 128, zeros=True),
}
TOKENS = (1, 4, 16, 64, 512, 2048)
DEFAULT_TOKENS = (1, 16, 64, 512)

# Operation -> formats it comes in and range of tokens that it meets.
OPS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "linear_in": (tuple(FORMATS), 1, 2048),
    "linear_out": (tuple(FORMATS), 1, 2048),
    "experts": (tuple(FORMATS), 1, 2048),
    "attention_decode": (("bf16",), 1, 64),  # tokens of as many sequences
    "attention_prefill": (("bf16",), 64, 2048),  # tokens of one sequence
    "norm_rope": (("float32",), 1, 2048),
    "router": (("float32",), 1, 2048),
    "lm_head_sample": (tuple(FORMATS), 1, 64),  # rows that a step samples from
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    op: str
    layer: Layer
    format: str
    tokens: int
    threads: int
    isa: str

    def __str__(self) -> str:
        return f"{self.op}-{self.layer.name}-{self.format}-{self.tokens}-{self.threads}t-{self.isa}"


@dataclass(frozen=True)
class Selection:
    """What the options ask for; the order of the rows keeps those of one working set together."""

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    tokens: tuple[int, ...]
    threads: tuple[int, ...]
    isas: tuple[str, ...]

    def cases(self) -> Iterator[Case]:
        for op, (formats, fewest, most) in OPS.items():
            for name in self.layers:
                for weight_format in formats:
                    if weight_format in FORMATS and weight_format not in self.formats:
                        continue
                    for tokens in self.tokens:
                        if fewest <= tokens <= most:
                            yield from self._rows(op, LAYERS[name], weight_format, tokens)

    def _rows(self, op: str, layer: Layer, weight_format: str, tokens: int) -> Iterator[Case]:
        for isa in self.isas:
            for threads in self.threads:
                yield Case(op, layer, weight_format, tokens, threads, isa)
