"""Which mixtures bench/gpu.py measures, in which formats and batch sizes, and the targets they are held to.

T tokens, E experts, H hidden, I intermediate. Knows no kernel.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One mixture of experts; ``shared`` is the intermediate size of what every token visits, 0 for none."""

    name: str
    hidden: int
    experts: int
    top_k: int
    intermediate: int
    shared: int = 0
    norm_topk_prob: bool = True

    def operations(self, tokens: int) -> float:
        """Multiplications and additions of all matrix products."""
        return 6.0 * tokens * self.hidden * (self.top_k * self.intermediate + self.shared)


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3", 2048, 128, 8, 768),
        Layer("olmoe", 2048, 64, 8, 1024, norm_topk_prob=False),
        Layer("deepseek", 2048, 64, 6, 1408, 2 * 1408, norm_topk_prob=False),
        Layer("mixtral", 4096, 8, 2, 14336),
    )
}
TOY_LAYERS = {"toy": Layer("toy", 64, 4, 2, 32, 64)}
FORMATS = ("bf16", "fp8", "int4")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
TOY_TOKENS = (1, 6)


@dataclass(frozen=True)
class Grid:
    """What one run goes over; the most important first, because a run ends when its time does."""

    layers: dict[str, Layer]
    formats: tuple[str, ...]
    tokens: tuple[int, ...]
    masked_tokens: tuple[int, ...]

    def cases(self) -> list[tuple[Layer, str]]:
        """Pairs that share their weights: every format of the first layer, then of the next."""
        return [(layer, each) for layer in self.layers.values() for each in self.formats]


GRID = Grid(LAYERS, FORMATS, TOKENS, (1, 4, 16, 64, 512))
TOY_GRID = Grid(TOY_LAYERS, FORMATS, TOY_TOKENS, (1, 65))


@dataclass(frozen=True)
class Target:
    """``value`` of a row of the table is to be at least ``least``."""

    name: str
    formats: tuple[str, ...]
    tokens: tuple[int, int]  # from, to
    value: str
    least: float

    def applies(self, weight_format: str, tokens: int) -> bool:
        return weight_format in self.formats and self.tokens[0] <= tokens <= self.tokens[1]


TARGETS = (
    Target("1-4 tokens: 70 % of the byte floor", FORMATS, (1, 4), "of_byte_floor", 0.70),
    Target("1-4 tokens: twice the best torch path", ("bf16",), (1, 4), "ratio_to_best_peer", 2.0),
    Target("16-128 tokens: 80 % of the byte floor", FORMATS, (16, 128), "of_byte_floor", 0.80),
    Target("4096 tokens: 55 % of the matrix rate", ("bf16",), (4096, 4096), "of_matmul_rate", 0.55),
)
MASK_COST_AT_MOST = 0.01
# Relative error of a result against float64 on the same weights: activations are rounded to bf16 on the way.
ERROR_AT_MOST = 1e-2
