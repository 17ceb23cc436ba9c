"""Is one MoE layer faster than in kt-kernel at the same bits? `python bench/versus_kt_kernel.py WORK`.

The layer is Qwen3-30B-A3B's. Both sides hold exactly the same weights: integers times a power of two per
row, which kt-kernel's own quantisation finds again, and so do our formats; the error of both is that of the
output against float64 of these weights. kt-kernel runs in an environment of its own under WORK (made once),
once per backend and number of workers, each a stopped process except in its turn. Turns alternate; each side
rotates over its own copies of the layer, at least 2 GB of them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, save, summary
from kernels_cases import LAYERS
from kernels_limits import Meter
from kernels_workloads import KERNELS, Workload, routing
from kt_kernel_process import KT_KERNEL, KtKernel, environment
from safetensors.torch import load_file, save_file

import moe_runtime._C as _C
from moe_runtime.kernels import PackedExperts, QuantizedWeight, WeightFormat

LAYER = LAYERS["qwen3"]
DISTINCT = 8  # expert e has the weights of e % DISTINCT: the time does not depend on them
FORMATS = {4: WeightFormat("int4", 128), 8: WeightFormat("int8")}
# Name, class in kt-kernel, scale group (0: one scale per row). AMXINT* run on AVX-512 VNNI without AMX.
BACKENDS = {
    4: (("AMXINT4", "AMXInt4_MOE", 0), ("RAWINT4", "AMXInt4_KGroup_MOE", 32)),
    8: (("AMXINT8", "AMXInt8_MOE", 0),),
}
SIZES = {name: getattr(LAYER, name) for name in ("experts", "top_k", "hidden", "intermediate")}
PARTS = (("gate", LAYER.intermediate, LAYER.hidden), ("up", LAYER.intermediate, LAYER.hidden),
         ("down", LAYER.hidden, LAYER.intermediate))  # fmt: skip


# --- the same weights and tokens for both -------------------------------------------------------------------


def make_weights(bits: int) -> dict[str, torch.Tensor]:
    """Per part: signed codes int8 [DISTINCT, N, K] that reach the largest in each row, and a power of two
    per row float32 [DISTINCT, N]. Products with rows of variance 1 have about variance 1.
    """
    generator = torch.Generator().manual_seed(bits)
    largest = 2 ** (bits - 1) - 1
    weights = {}
    for part, n, k in PARTS:
        codes = torch.randint(-largest, largest + 1, (DISTINCT, n, k), generator=generator)
        codes[:, :, 0] = largest
        exponents = torch.randint(-1, 2, (DISTINCT, n), generator=generator)
        weights[part] = codes.to(torch.int8)
        weights[f"{part}_scales"] = 2.0 ** (exponents - round(math.log2(largest * 0.58 * k**0.5)))
    return weights


def make_inputs(tokens: int, calls: int) -> dict[str, torch.Tensor]:
    """x bf16 [calls, T, H], ids int64 and scores float32 [calls, T, top_k]."""
    torch.manual_seed(tokens)
    choices = routing(LAYER, tokens, calls)
    return {
        "x": torch.randn(calls, tokens, LAYER.hidden).bfloat16(),
        "ids": torch.stack([ids for ids, _ in choices]).long(),
        "scores": torch.stack([scores for _, scores in choices]),
    }


def truth(weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], call: int) -> torch.Tensor:
    """The layer's output of one call in float64, [T, H]."""
    x, ids = inputs["x"][call].double(), inputs["ids"][call] % DISTINCT
    scores = inputs["scores"][call].double()
    out = torch.zeros_like(x)
    for each in range(DISTINCT):
        gate, up, down = (
            weights[part][each].double() * weights[f"{part}_scales"][each, :, None] for part, _, _ in PARTS
        )
        rows, slots = torch.nonzero(ids == each, as_tuple=True)
        hidden = torch.nn.functional.silu(x[rows] @ gate.T) * (x[rows] @ up.T)
        out.index_add_(0, rows, hidden @ down.T * scores[rows, slots, None])
    return out


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


# --- the sides ----------------------------------------------------------------------------------------------


class Ours:
    """Our kernels over copies of the layer."""

    def __init__(self, bits: int, weights: dict[str, torch.Tensor], num_bytes: float) -> None:
        layer, form = LAYER, FORMATS[bits]
        first = KERNELS.new_experts(layer.experts, layer.hidden, layer.intermediate, form)
        for expert in range(DISTINCT):
            for part, _, k in PARTS:
                codes = (weights[part][expert].int() + 2 ** (bits - 1)).to(torch.uint8)
                scales = weights[f"{part}_scales"][expert, :, None].repeat(1, form.num_groups(k))
                KERNELS.pack_expert(first, expert, part, QuantizedWeight(codes, scales, None, form))
        for expert in range(DISTINCT, layer.experts):
            first.gate_up[expert] = first.gate_up[expert % DISTINCT]
            first.down[expert] = first.down[expert % DISTINCT]
        self.layers = [first]
        for _ in range(math.ceil(num_bytes / first.num_bytes) - 1):
            copy: PackedExperts = KERNELS.new_experts(layer.experts, layer.hidden, layer.intermediate, form)
            copy.gate_up[:], copy.down[:] = first.gate_up, first.down
            self.layers.append(copy)

    def call(self, inputs: dict[str, torch.Tensor], index: int) -> Callable[[], torch.Tensor]:
        """What call ``index`` does, its tokens ready as our layers hand them on: float32 and int32."""
        at = index % len(inputs["x"])
        x, ids = inputs["x"][at].float(), inputs["ids"][at].int()
        return lambda: KERNELS.fused_moe(x, ids, inputs["scores"][at], self.layers[index % len(self.layers)])


def time_ours(ours: Ours, inputs: dict[str, torch.Tensor], first: int, count: int) -> list[float]:
    ours.call(inputs, first - 1)()
    seconds = []
    for i in range(count):
        call = ours.call(inputs, first + i)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def bound_of(
    ours: Ours, bits: int, tokens: int, inputs: dict[str, torch.Tensor], meter: Meter
) -> dict[str, Any]:
    """The roofline of our call, as bench/kernels.py has it."""
    per_expert = ours.layers[0].num_bytes / LAYER.experts
    active = statistics.mean(ids.unique().numel() for ids in inputs["ids"])
    num_bytes = active * per_expert + 8 * tokens * LAYER.hidden
    operations = 6 * tokens * LAYER.top_k * LAYER.hidden * LAYER.intermediate
    work = Workload([], num_bytes, operations, FORMATS[bits], len(ours.layers) * ours.layers[0].num_bytes)
    limits = meter.measure(work)
    return {
        "seconds": limits.bound(work),
        "limited_by": limits.limited_by(work),
        "read_gb_per_s": limits.bandwidth / 1e9,
        "peak_gop_per_s": limits.peak / 1e9,
        "instruction": limits.instruction,
    }


def measure(
    bits: int,
    tokens: int,
    options: argparse.Namespace,
    ours: Ours,
    theirs: dict[str, KtKernel],
    weights: dict[str, torch.Tensor],
    meter: Meter,
) -> dict[str, Any]:
    """One row: alternating turns, then the error of every side on the same tokens."""
    folder, rounds = options.work / f"int{bits}", options.rounds
    count = {1: 16, 8: 6}.get(tokens, 3)  # calls of a side in one turn
    inputs = make_inputs(tokens, max(len(ours.layers) * 16 if tokens == 1 else 0, count * rounds))
    save_file(inputs, folder / f"tokens-{tokens}.safetensors")
    own: list[float] = []
    other: dict[str, list[float]] = {name: [] for name in theirs}
    bounds = []
    for turn in range(rounds):
        first = 1 + turn * count
        bounds.append(bound_of(ours, bits, tokens, inputs, meter))
        own.append(statistics.median(time_ours(ours, inputs, first, count)))
        for name, side in theirs.items():
            other[name].append(
                statistics.median(side.ask(tokens=tokens, first=first, count=count)["seconds"])
            )
    checked = range(-(-32 // tokens))  # calls whose outputs are compared
    expected = torch.cat([truth(weights, inputs, call) for call in checked])
    bound = min(bounds, key=lambda each: each["seconds"])
    row: dict[str, Any] = {
        "bits": bits, "tokens": tokens, "format": str(FORMATS[bits]), "seconds": summary(own),
        "error": error(torch.cat([ours.call(inputs, call)() for call in checked]), expected), "bound": bound,
        "fraction_of_bound": bound["seconds"] / statistics.median(own), "kt_kernel": {},
    }  # fmt: skip
    for name, side in theirs.items():
        outputs = []
        for call in checked:
            side.ask(tokens=tokens, first=call, output=str(folder / "output.safetensors"))
            outputs.append(load_file(folder / "output.safetensors")["out"])
        row["kt_kernel"][name] = {
            "seconds": summary(other[name]),
            "ratio": summary([theirs / ours for theirs, ours in zip(other[name], own, strict=True)]),
            "error": error(torch.cat(outputs), expected),
        }
    row["times_best_kt_kernel"] = min(side["ratio"]["median"] for side in row["kt_kernel"].values())
    return row


def show(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    print(
        f"{row['format']:10} T={row['tokens']:<4} ours {seconds['median'] * 1e3:7.2f} ms "
        f"({seconds['q1'] * 1e3:.2f}-{seconds['q3'] * 1e3:.2f}), error {row['error']:.2%}, "
        f"{row['fraction_of_bound']:.0%} of {row['bound']['limited_by']}, "
        f"{row['times_best_kt_kernel']:.2f}x the best of:"
    )
    for name, side in row["kt_kernel"].items():
        ratio = side["ratio"]
        print(
            f"    {name:28} {side['seconds']['median'] * 1e3:8.2f} ms, {ratio['median']:.2f}x ours "
            f"({ratio['q1']:.2f}-{ratio['q3']:.2f}), error {side['error']:.2%}",
            flush=True,
        )


def compare(bits: int, options: argparse.Namespace, python: Path, meter: Meter) -> list[dict[str, Any]]:
    """All rows of one width: starts every side, measures, ends them."""
    folder = options.work / f"int{bits}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(bits)
    save_file(weights, folder / "weights.safetensors")
    ours = Ours(bits, weights, options.working_set * 1e9)
    theirs: dict[str, KtKernel] = {}
    try:
        for name, backend, group in BACKENDS[bits]:
            for workers in dict.fromkeys(options.workers):
                order = {**SIZES, "backend": backend, "group": group, "workers": workers}
                order |= {"layers": len(ours.layers), "max_tokens": -(-max(options.tokens) // 32) * 32}
                side = KtKernel(python, folder, order)
                theirs[f"{name}, {workers} workers, {side.variant}"] = side
        rows = []
        for tokens in options.tokens:
            rows.append(measure(bits, tokens, options, ours, theirs, weights, meter))
            show(rows[-1])
        return rows
    finally:
        for side in theirs.values():
            side.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for the environment, weights and logs; some 2 GB")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, _C.num_threads()], help="of kt-kernel")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--working-set", type=float, default=2.0, help="GB per side (default 2)")
    options = parser.parse_args()
    about = {**machine(), "threads": _C.num_threads(), "isa_selected": _C.isa(), "kt_kernel": KT_KERNEL}
    about["command"] = about["command"].replace(str(options.work), "WORK")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    python = environment(options.work)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    meter = Meter()
    with torch.inference_mode():
        rows = [row for bits in options.bits for row in compare(bits, options, python, meter)]
    print(save("versus_kt_kernel", {"machine": about, "rows": rows}))


if __name__ == "__main__":
    main()
