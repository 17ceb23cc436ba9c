"""What one row of bench/kernels.py runs: calls over a working set far larger than the caches.

One matrix (or expert) is made of random codes and copied: the kernels' time does not depend on the values.
The calls of a row walk through the set, so a weight is read again only after everything else has been.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from kernels_cases import FORMATS, Case, Layer

import moe_runtime._C as _C
from moe_runtime.kernels import PackedExperts, PackedLinear, QuantizedWeight, RouterSpec, WeightFormat, choose
from moe_runtime.sampling import History, SamplingParams, sample

KERNELS = choose("cpu")
CONTEXT, BLOCK = 4096, 16  # of attention at decode
CACHED_INPUTS = 4  # activations are in the cache in a decoder too: its previous operation wrote them
MAX_CALLS = 256
ATTENTION_KIND = WeightFormat("float32")  # what it multiplies in, whatever the cache holds
HUGE_PAGE = 2 << 20

Call = Callable[[], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """``calls`` in turn. Per call on average: ``num_bytes`` that must be read, ``operations`` that must be
    done (a multiply-add is two), in the arithmetic of weights of ``kind``. ``working_set`` bytes are
    read before the first call comes again.
    """

    calls: list[Call]
    num_bytes: float
    operations: float
    kind: WeightFormat
    working_set: float


class WorkingSets:
    """The set of the rows that run now; the next one takes its place, or two would not fit into memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def get(self, build: Callable[..., T], *arguments: Any) -> T:
        """``build(*arguments, how many bytes the set should have)``, kept until another is asked for."""
        key = (build, *arguments)
        if key != self._key:
            self._value = None
            self._value = build(*arguments, self.num_bytes)
            self._key = key
        return self._value


def random_weight(n: int, k: int, weight_format: WeightFormat) -> torch.Tensor | QuantizedWeight:
    """[N, K] whose products with rows of variance 1 have about variance 1."""
    if not weight_format.is_integer:
        return (torch.randn(n, k) / k**0.5).to(weight_format.dtype)
    groups = weight_format.num_groups(k)
    levels, deviation = (16, 4.3) if weight_format.kind == "int4" else (256, 74.0)
    codes = torch.randint(1, levels, (n, k), dtype=torch.uint8)
    zeros = torch.randint(4, 12, (n, groups), dtype=torch.uint8) if weight_format.zeros else None
    # Of a power of two per row and a float16 per group, as the kernels store them.
    scales = (torch.rand(n, groups) + 0.5).half().float() * 2.0 ** -round(math.log2(deviation * k**0.5))
    return QuantizedWeight(codes, scales, zeros, weight_format)


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Uninitialised uint8 [num_bytes], on huge pages where there are any, as packed weights are."""
    room = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE_PAGE
    _C.advise_huge_pages(room.data_ptr() + start, num_bytes)
    return room[start : start + num_bytes]


def linear_set(n: int, k: int, weight_format: WeightFormat, num_bytes: int) -> list[PackedLinear]:
    """As many copies of one [N, K] as fill ``num_bytes``."""
    first = KERNELS.pack_linear(random_weight(n, k, weight_format))
    count = -(-num_bytes // first.num_bytes)
    room = huge_pages(count * first.num_bytes).view(count, 1, first.num_bytes)
    room[:] = first.data
    return [replace(first, data=data) for data in room]


def experts_set(layer: Layer, weight_format: WeightFormat, num_bytes: int) -> list[PackedExperts]:
    """As many layers of experts as fill ``num_bytes``, at least one."""

    def one_layer() -> PackedExperts:
        return KERNELS.new_experts(layer.experts, layer.hidden, layer.intermediate, weight_format)

    layers = [one_layer()]
    for part, n, k in (
        ("gate", layer.intermediate, layer.hidden),
        ("up", layer.intermediate, layer.hidden),
        ("down", layer.hidden, layer.intermediate),
    ):
        KERNELS.pack_expert(layers[0], 0, part, random_weight(n, k, weight_format))
    layers += [one_layer() for _ in range(-(-num_bytes // layers[0].num_bytes) - 1)]
    first = (layers[0].gate_up[0].clone(), layers[0].down[0].clone())
    for each in layers:
        each.gate_up[:], each.down[:] = first
    return layers


def set_bytes(weights: Sequence[PackedLinear | PackedExperts]) -> int:
    return sum(each.num_bytes for each in weights)


def num_calls(case_bytes: float, num_bytes: int) -> int:
    """So many that the calls read the whole set before the first comes again."""
    return min(max(-int(-num_bytes // case_bytes), 4), MAX_CALLS)


def inputs(*shape: int) -> Iterator[torch.Tensor]:
    """Random activations float32, a few of them again and again."""
    return itertools.cycle([torch.randn(shape) for _ in range(CACHED_INPUTS)])


# --- matrix products ----------------------------------------------------------------------------------------


def linear(case: Case, sets: WorkingSets) -> Workload:
    n, k = case.layer.linear_in if case.op == "linear_in" else case.layer.linear_out
    weight_format = FORMATS[case.format]
    weights = sets.get(linear_set, n, k, weight_format)
    rows = inputs(case.tokens, k)
    calls: list[Call] = [functools.partial(KERNELS.linear, next(rows), weight) for weight in weights]
    num_bytes = weights[0].num_bytes + 4 * case.tokens * (n + k)
    return Workload(calls, num_bytes, 2 * case.tokens * n * k, weight_format, set_bytes(weights))


def routing(layer: Layer, tokens: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Expert ids [T, k] and weights [T, k] of ``count`` calls. Single tokens walk through all experts before
    one comes again; more tokens choose at random, each for itself, so that some share experts.
    """
    if tokens == 1:
        per_turn = layer.experts // layer.top_k
        turns = [torch.randperm(layer.experts) for _ in range(-(-count // per_turn))]
        ids = [
            turn[i * layer.top_k : (i + 1) * layer.top_k].view(1, -1).int()
            for turn in turns
            for i in range(per_turn)
        ]
        return [(each, torch.full((1, layer.top_k), 1 / layer.top_k)) for each in ids[:count]]
    spec = RouterSpec(layer.top_k, norm_topk_prob=True)
    return [KERNELS.route(torch.randn(tokens, layer.experts), spec) for _ in range(count)]


def experts(case: Case, sets: WorkingSets) -> Workload:
    layer, weight_format = case.layer, FORMATS[case.format]
    layers = sets.get(experts_set, layer, weight_format)
    per_expert = layers[0].num_bytes / layer.experts
    expected = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** case.tokens)
    choices = routing(layer, case.tokens, num_calls(expected * per_expert, sets.num_bytes))
    rows = inputs(case.tokens, layer.hidden)
    calls: list[Call] = [
        # Layer after layer; a single token goes on to the next experts when it has been in every layer.
        functools.partial(
            KERNELS.fused_moe, next(rows), *choices[i // len(layers) if case.tokens == 1 else i], each
        )
        for i, each in zip(range(len(choices)), itertools.cycle(layers))
    ]
    active = sum(ids.unique().numel() for ids, _ in choices) / len(choices)
    parameters = 3 * layer.hidden * layer.intermediate
    num_bytes = active * per_expert + 8 * case.tokens * layer.hidden
    operations = 2 * case.tokens * layer.top_k * parameters
    seen = min(len(calls) * num_bytes, set_bytes(layers))
    return Workload(calls, num_bytes, operations, weight_format, seen)


def lm_head_sample(case: Case, sets: WorkingSets) -> Workload:
    """Logits of T rows, and one token sampled from each: temperature 0.7, top_k 20, top_p 0.8."""
    n, k = case.layer.vocabulary, case.layer.hidden
    weight_format = FORMATS[case.format]
    weights = sets.get(linear_set, n, k, weight_format)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8)

    def call(x: torch.Tensor, weight: PackedLinear) -> list[int]:
        logits = KERNELS.linear(x, weight).numpy()
        return [sample(row, params, History(params), seed, 0) for seed, row in enumerate(logits)]

    rows = inputs(case.tokens, k)
    calls: list[Call] = [functools.partial(call, next(rows), weight) for weight in weights]
    num_bytes = weights[0].num_bytes + 4 * case.tokens * (2 * n + k)
    return Workload(calls, num_bytes, 2 * case.tokens * n * k, weight_format, set_bytes(weights))


# --- attention ----------------------------------------------------------------------------------------------


def cache_set(layer: Layer, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A bf16 cache of ``num_bytes``: keys and values, or the keys that hold both."""
    widths = [layer.key_dim] if layer.latent_value else [layer.key_dim] * 2
    blocks = -(-num_bytes // (2 * sum(widths) * layer.kv_heads * BLOCK))
    parts = []
    for width in widths:
        part = torch.empty(blocks, layer.kv_heads, BLOCK, width, dtype=torch.bfloat16)
        part[:] = (
            torch.randn(64, layer.kv_heads, BLOCK, width)
            .bfloat16()
            .repeat(-(-blocks // 64), 1, 1, 1)[:blocks]
        )
        parts.append(part)
    return parts[0], parts[1] if len(parts) == 2 else None


def attention(case: Case, sets: WorkingSets) -> Workload:
    """Decode: each token has its own sequence of 4096. Prefill: a prompt of T tokens, from its first."""
    layer, decode = case.layer, case.op == "attention_decode"
    sequences, length = (case.tokens, CONTEXT) if decode else (1, case.tokens)
    keys, values = sets.get(cache_set, layer)
    needed = -(-length // BLOCK) * sequences
    order = torch.randperm(max(keys.shape[0], needed)).int() % keys.shape[0]
    rows = inputs(case.tokens, layer.heads, layer.key_dim)
    positions = torch.full((case.tokens,), length - 1) if decode else torch.arange(length)
    sequence_of = torch.arange(sequences) if decode else torch.zeros(length)
    calls: list[Call] = []
    for first in range(0, order.numel() - needed + 1, needed)[:MAX_CALLS]:
        table = order[first : first + needed].view(sequences, -1).contiguous()
        calls.append(
            functools.partial(
                KERNELS.attention, next(rows), keys, values, positions.int(), sequence_of.int(), table,
                layer.key_dim**-0.5, layer.latent_value,
            )
        )  # fmt: skip
    width = layer.key_dim + (0 if layer.latent_value else layer.key_dim)  # cached numbers per key head
    num_bytes = 2 * sequences * length * layer.kv_heads * width
    num_bytes += 4 * case.tokens * layer.heads * (layer.key_dim + (layer.latent_value or layer.key_dim))
    seen = sequences * length if decode else length * (length + 1) // 2  # (query, key) pairs
    operations = 2 * seen * layer.heads * (layer.key_dim + (layer.latent_value or layer.key_dim))
    cached = sum(part.numel() * part.element_size() for part in (keys, values) if part is not None)
    return Workload(calls, num_bytes, operations, ATTENTION_KIND, min(len(calls) * num_bytes, cached))


# --- rows ---------------------------------------------------------------------------------------------------


def norm_rope(case: Case, sets: WorkingSets) -> Workload:
    """add_rms_norm of [T, H] and rope of the queries [T, heads, D], out of the cache."""
    layer = case.layer
    weight, positions = torch.ones(layer.hidden), torch.arange(case.tokens).int()
    cos, sin = torch.ones(case.tokens, layer.rope_dim // 2), torch.zeros(case.tokens, layer.rope_dim // 2)
    interleaved = layer.latent_value is not None

    def call(x: torch.Tensor, residual: torch.Tensor, query: torch.Tensor) -> None:
        KERNELS.add_rms_norm(x, residual, weight, 1e-6)
        KERNELS.rope(query, cos, sin, positions, interleaved)

    rows, queries = inputs(case.tokens, layer.hidden), inputs(case.tokens, layer.heads, layer.rope_dim)
    calls: list[Call] = [
        functools.partial(call, next(rows), next(rows), next(queries)) for _ in range(CACHED_INPUTS)
    ]
    numbers = 4 * layer.hidden + 2 * layer.heads * layer.rope_dim  # read and written, per token
    operations = case.tokens * (6 * layer.hidden + 3 * layer.heads * layer.rope_dim)
    num_bytes = 4 * case.tokens * numbers
    return Workload(calls, num_bytes, operations, WeightFormat("float32"), CACHED_INPUTS * num_bytes)


def router(case: Case, sets: WorkingSets) -> Workload:
    """Logits by a float32 matrix [E, H], then the choice of the top_k."""
    layer, weight_format = case.layer, WeightFormat("float32")
    weights = sets.get(linear_set, layer.experts, layer.hidden, weight_format)
    spec = RouterSpec(layer.top_k, norm_topk_prob=True)
    rows = inputs(case.tokens, layer.hidden)

    def call(x: torch.Tensor, weight: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
        return KERNELS.route(KERNELS.linear(x, weight), spec)

    calls: list[Call] = [functools.partial(call, next(rows), weight) for weight in weights]
    num_bytes = weights[0].num_bytes + 4 * case.tokens * layer.hidden
    operations = 2 * case.tokens * layer.experts * layer.hidden
    return Workload(calls, num_bytes, operations, weight_format, set_bytes(weights))


BUILDERS: dict[str, Callable[[Case, WorkingSets], Workload]] = {
    "linear_in": linear,
    "linear_out": linear,
    "experts": experts,
    "attention_decode": attention,
    "attention_prefill": attention,
    "norm_rope": norm_rope,
    "router": router,
    "lm_head_sample": lm_head_sample,
}
