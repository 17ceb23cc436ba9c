"""One MoE layer in kt-kernel, measured on demand by versus_kt_kernel.py; runs in kt-kernel's own environment.

Arguments: JSON with backend, workers, layers, max_tokens, folder and the layer's sizes. Orders come as JSON
lines on standard input, answers go to what was standard output; what kt-kernel prints goes to the log.
It knows nothing of moe_runtime.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import kt_kernel  # noqa: F401  (loads the extension that fits the processor, and names it)
import kt_kernel_ext
import torch
from kt_kernel_ext import moe as backends
from safetensors.torch import load_file, save_file

PARTS = ("gate", "up", "down")


class Layers:
    """The same weights several times in different memory, so that rotating over them misses the caches."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [order["workers"]]
        self._infer = kt_kernel_ext.CPUInfer(pool)
        self._on_gpu = torch.zeros(order["experts"], dtype=torch.bool)  # none
        self._ids = torch.arange(order["experts"])
        weights = load_file(Path(order["folder"]) / "weights.safetensors")
        grouped = order["backend"] not in ("AMXInt4_MOE", "AMXInt8_MOE")
        source = self._nibbles(weights) if grouped else self._plain(weights)
        self._layers = [self._load(source, grouped) for _ in range(order["layers"])]
        self._inputs: dict[int, dict[str, torch.Tensor]] = {}

    def _all_experts(self, part: torch.Tensor) -> torch.Tensor:
        """Expert e is the (e % distinct)-th matrix of the file."""
        return part.repeat(self._order["experts"] // part.shape[0], *([1] * (part.dim() - 1))).contiguous()

    def _plain(self, weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
        """bf16, which holds these weights exactly; kt-kernel quantises them per row to the same codes."""
        return {
            part: (self._all_experts((weights[part] * weights[f"{part}_scales"][..., None]).bfloat16()),)
            for part in PARTS
        }

    def _nibbles(self, weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
        """compressed-tensors' int4: code + 8, even k in the low half; bf16 scales per group."""
        out = {}
        for part in PARTS:
            codes = (weights[part] + 8).to(torch.uint8)
            groups = codes.shape[2] // self._order["group"]
            scales = weights[f"{part}_scales"].bfloat16()[..., None].repeat(1, 1, groups)
            out[part] = (
                self._all_experts(codes[..., 0::2] | (codes[..., 1::2] << 4)),
                self._all_experts(scales),
            )
        return out

    def _load(self, source: dict[str, tuple[torch.Tensor, ...]], grouped: bool) -> Any:
        order = self._order
        sizes = (order["experts"], order["top_k"], order["hidden"], order["intermediate"])
        config = backends.MOEConfig(*sizes, self._on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self._infer.backend_, order["max_tokens"]
        if grouped:
            config.quant_config.bits, config.quant_config.zero_point = 4, False
            config.quant_config.group_size = order["group"]
        for part, tensors in source.items():
            if grouped:
                codes, scales = ([[each.data_ptr() for each in tensor]] for tensor in tensors)
                setattr(config, f"{part}_projs", codes)
                setattr(config, f"{part}_scales", scales)
            else:
                setattr(config, f"{part}_proj", tensors[0].data_ptr())
        layer = getattr(backends, order["backend"])(config)
        self._infer.submit(layer.load_weights_task(self._ids.data_ptr()))
        self._infer.sync()
        return layer

    def call(self, tokens: int, index: int) -> tuple[float, torch.Tensor]:
        """Seconds and output [T, H] of call ``index``: its own tokens, the next layer."""
        if tokens not in self._inputs:
            self._inputs = {tokens: load_file(Path(self._order["folder"]) / f"tokens-{tokens}.safetensors")}
        inputs = self._inputs[tokens]
        x = inputs["x"][index % len(inputs["x"])]
        ids, scores = (inputs[name][index % len(inputs[name])] for name in ("ids", "scores"))
        out = torch.empty_like(x)
        count = torch.tensor([tokens], dtype=torch.int32)
        pointers = [each.data_ptr() for each in (ids, scores, x, out)]
        start = time.perf_counter()
        layer = self._layers[index % len(self._layers)]
        self._infer.submit(layer.forward_task(count.data_ptr(), self._order["top_k"], *pointers, False))
        self._infer.sync()
        return time.perf_counter() - start, out


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    layers = Layers(json.loads(sys.argv[1]))
    print(json.dumps({"variant": kt_kernel.__cpu_variant__}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        tokens, first = order["tokens"], order["first"]
        if "output" in order:
            save_file({"out": layers.call(tokens, first)[1]}, order["output"])
            print(json.dumps({}), file=answers)
            continue
        layers.call(tokens, first - 1)  # wakes the threads up, in other memory than what follows
        seconds = [layers.call(tokens, first + i)[0] for i in range(order["count"])]
        print(json.dumps({"seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
