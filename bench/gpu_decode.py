"""A decode step of a whole model, Qwen3-30B-A3B's 48 layers with random weights made on the device: what the
host sees from the batch to the tokens, replayed as a captured graph and launched kernel by kernel.

The floor of a step is what it has to read once: each layer's attention and router, the experts that its rows
chose, their cached keys and values, the head. Four masks mixed over the rows allow everything, so that the
same experts are chosen; obeying them and measuring what they take away is what they cost.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from gpu_clock import FEWEST, MOST, Clock, Timing
from gpu_limits import Limits
from gpu_shapes import MASK_COST_AT_MOST
from gpu_weights import random_experts, random_linear

from moe_runtime.batch import Batch
from moe_runtime.graph_recorder import recorder_for
from moe_runtime.graphs import DecodeGraphs, PlainSteps
from moe_runtime.hf_config import Fields
from moe_runtime.kernels import RouteMeter, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.models import find_architecture

MASKS = 4
BLOCK_SIZE = 16
SPARE_BYTES = 6 << 30  # for graphs, activations, logits and what the driver takes


@dataclass(frozen=True)
class Sizes:
    """``config``: config.json's; ``cached``: tokens that each sequence has in the cache."""

    name: str
    config: MappingProxyType[str, Any]
    cached: int
    sequences: tuple[int, ...]
    formats: tuple[str, ...]
    seconds: float  # for the samples of one way


COMMON = {
    "model_type": "qwen3_moe", "hidden_act": "silu", "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3 = Sizes(
    "Qwen3-30B-A3B",
    MappingProxyType(
        COMMON | {
            "num_hidden_layers": 48, "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 40960,
        }
    ),
    1024, (1, 4, 16, 64), ("bf16", "int4"), 0.5,
)  # fmt: skip
TOY = Sizes(
    "toy",
    MappingProxyType(
        COMMON | {
            "num_hidden_layers": 2, "hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64,
        }
    ),
    5, (3,), ("bf16",), 0.0,
)  # fmt: skip


class CallAgain:
    """A dry run's recorder: what is captured is called again."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def free_bytes(self) -> int:
        return 0

    def settle(self) -> None:
        raise RuntimeError("a dry run has no device to wait for")


class Model:
    """One format's model, its cache and both ways to run its steps."""

    def __init__(self, sizes: Sizes, weight_format: str, clock: Clock) -> None:
        self.sizes, self.device = sizes, clock.device
        most = max(sizes.sequences)
        self.blocks = -(-(sizes.cached + 1) // BLOCK_SIZE)
        self.layers = _layers_that_fit(sizes, weight_format, most * self.blocks, clock)
        fields = Fields(dict(sizes.config) | {"num_hidden_layers": self.layers})
        architecture = find_architecture("qwen3_moe")
        self.decoder: Decoder = architecture.build(
            architecture.read_config(fields), choose("triton", device=self.device)
        )
        self.other_bytes = sum(_fill(self.decoder, weight_format, self.device))
        cache = self.decoder.new_cache(most * self.blocks, BLOCK_SIZE)
        self.cache_bytes_per_token = cache.num_bytes / (most * self.blocks * BLOCK_SIZE)
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                if part is not None:
                    part.normal_()
        self.plain = PlainSteps(self.decoder, cache)
        recorder = recorder_for(self.device) or CallAgain()
        self.graphs = DecodeGraphs(
            self.decoder, cache, recorder, most, block_size=BLOCK_SIZE, max_blocks=self.blocks
        )

    def batch(self, sequences: int, masked: bool) -> Batch:
        """The next token of each sequence, blocks in scrambled order."""
        generator = torch.Generator().manual_seed(sequences)
        order = torch.randperm(max(self.sizes.sequences) * self.blocks, generator=generator)
        tables = order.int().view(-1, self.blocks)[:sequences].contiguous()
        rows, at = torch.arange(sequences), self.sizes.cached
        return Batch(
            token_ids=torch.randint(0, self.sizes.config["vocab_size"], (sequences,), generator=generator),
            positions=torch.full((sequences,), at, dtype=torch.int32),
            slots=tables[:, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE,
            sequence_rows=rows.int(),
            block_tables=tables,
            logit_rows=rows,
            mask_rows=rows.int() % MASKS if masked else torch.full((sequences,), -1, dtype=torch.int32),
        )

    def floor_bytes(self, batch: Batch) -> float:
        """What this step reads: weights that every step does, chosen experts, cached rows."""
        sequences, chosen = len(batch.token_ids), []
        for _, mixture in self.decoder.mixtures():
            inner = mixture.experts.add_norm

            def add_norm(x: Any, ids: torch.Tensor, *rest: Any, go: Any = inner) -> Any:
                chosen.append(ids)
                return go(x, ids, *rest)

            mixture.experts.add_norm = add_norm  # type: ignore[method-assign]
        try:
            self.plain.forward(batch)
        finally:
            for _, mixture in self.decoder.mixtures():
                del mixture.experts.add_norm
        experts = next(mixture.experts for _, mixture in self.decoder.mixtures())
        per_expert = experts.num_bytes / self.sizes.config["num_experts"]
        distinct = sum(int(ids.unique().numel()) for ids in chosen)
        cached = sequences * (self.sizes.cached + 1) * self.cache_bytes_per_token
        return self.other_bytes + distinct * per_expert + cached


def _layers_that_fit(sizes: Sizes, weight_format: str, num_blocks: int, clock: Clock) -> int:
    config, wanted = sizes.config, int(sizes.config["num_hidden_layers"])
    if clock.device.type != "cuda":
        return wanted
    hidden, width = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights = 3 * config["num_experts"] * hidden * config["moe_intermediate_size"]
    weights += hidden * width * (2 * heads + 2 * kv_heads)
    per_layer = weights * {"bf16": 2.0, "int4": 4.25 / 8}[weight_format]
    per_layer += num_blocks * BLOCK_SIZE * 2 * kv_heads * width * 2
    ends = 2 * 2 * config["vocab_size"] * hidden
    free = torch.cuda.mem_get_info(clock.device)[0]
    return max(min(wanted, int((free - SPARE_BYTES - ends) / per_layer)), 1)


def _fill(model: Decoder, weight_format: str, device: torch.device) -> Iterator[float]:
    """Random weights in every home; yields the bytes of those that every step reads."""
    homes: dict[tuple[int, str], Any] = {}
    for slot in model.slots():
        place = slot.places[-1]
        homes.setdefault((id(place.owner), place.attribute), (place.owner, slot, []))[2].append(slot.shape[0])
    config = model.config
    for (_, attribute), (owner, slot, rows) in homes.items():
        if slot.part == "experts":
            shape = (config.moe.num_experts, config.hidden_size, config.moe.intermediate_size)
            made: Any = random_experts(*shape, weight_format, device)
        elif attribute == "weight":
            made = torch.ones(slot.shape, device=device)
        elif attribute == "table":
            made = torch.randn(slot.shape, device=device, dtype=torch.bfloat16)
        else:
            name = "bf16" if slot.part is None else weight_format
            made = random_linear(sum(rows), slot.shape[1], name, device)
            yield made.num_bytes
        setattr(owner, attribute, made)


def measure(model: Model, sequences: int, limits: Limits) -> dict[str, Any]:
    """One row: seconds of a step replayed, launched, and replayed with masks; whether the bits are equal."""
    batch, masked = model.batch(sequences, False), model.batch(sequences, True)
    # A step writes the same keys and values each time it is repeated.
    same = torch.equal(model.graphs.forward(batch).clone(), model.plain.forward(batch))
    meter = RouteMeter.zeros(sequences, model.device)
    same &= torch.equal(model.graphs.forward(masked, meter).clone(), model.plain.forward(batch))
    num_bytes = model.floor_bytes(batch)
    graph = model.device.type == "cuda"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "replayed": lambda: model.graphs.forward(batch),
        "masked": lambda: model.graphs.forward(masked, RouteMeter.zeros(sequences, model.device)),
        "launched": lambda: model.plain.forward(batch),
    }
    timings = {
        name: replace(_host_seconds(run, model.sizes.seconds), graph=graph and name != "launched")
        for name, run in ways.items()
    }
    replayed, cost = timings["replayed"], timings["masked"].median / timings["replayed"].median - 1
    return {
        "layers": model.layers,
        "cached": model.sizes.cached,
        "seconds": asdict(replayed),
        "launched": asdict(timings["launched"]),
        "masked": asdict(timings["masked"]),
        "bytes": num_bytes,
        "of_byte_floor": num_bytes / limits.bandwidth / replayed.median,
        "launched_of_byte_floor": num_bytes / limits.bandwidth / timings["launched"].median,
        "tokens_per_second": sequences / replayed.median,
        "cost": cost,
        "same_result": same,
        "passed": same,
        "targets": {"4 masks mixed: at most 1 % of a step": same and cost <= MASK_COST_AT_MOST},
    }


def _host_seconds(run: Callable[[], torch.Tensor], seconds: float) -> Timing:
    """Of a step, from its batch on the host to its tokens there."""
    run().argmax(1).tolist()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < (FEWEST if seconds else 1) or (time.perf_counter() < end and len(samples) < MOST):
        start = time.perf_counter()
        run().argmax(1).tolist()
        samples.append(time.perf_counter() - start)
    return Timing.of(samples, graph=False)
