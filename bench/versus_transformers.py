"""Is our model step faster than transformers on this machine? `python bench/versus_transformers.py DIR`.

DIR comes from bench/slice_checkpoint.py. Each side lives in its own process with the same number of
threads; the parent alternates A/B/A/B between them, so that a noisy neighbour hits both. Decode feeds random
tokens (greedy decoding of random weights loops on a few experts and would measure the cache). transformers
runs bf16 with each of its experts implementations for the CPU (grouped_mm and eager).
"""

import argparse
import multiprocessing as mp
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from common import machine, save, summary  # type: ignore[import-not-found]

PROMPT_TOKENS = 512
DECODE_CONTEXT = 128
DECODE_STEPS = 24


class Side(Protocol):
    """One engine: a prefill of many tokens, then single-token steps on the same sequence."""

    def prefill(self, tokens: list[int]) -> None:
        """Run all tokens through the model and make the last logits."""

    def decode(self, token: int) -> None:
        """Append one token and make its logits."""


class Ours:
    """The model behind our engine, with one sequence in the paged cache."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from moe_runtime import kernels, loader

        torch.set_num_threads(1)  # as the engine does: our pool does the work
        kernels.set_num_threads(threads)
        self.block_size = 16
        self.model = loader.load_model(folder, kernels.choose("auto"))
        self.cache = self.model.new_cache(64, self.block_size)
        self.length = 0

    def _forward(self, tokens: list[int]) -> None:
        import torch

        from moe_runtime.batch import Batch, no_masks

        count = len(tokens)
        positions = torch.arange(self.length, self.length + count)
        batch = Batch(
            token_ids=torch.tensor(tokens),
            positions=positions.int(),
            slots=positions,
            sequence_rows=torch.zeros(count, dtype=torch.int32),
            block_tables=torch.arange(64, dtype=torch.int32).unsqueeze(0),
            logit_rows=torch.tensor([count - 1]),
            mask_rows=no_masks(count),
        )
        self.model.forward(batch, self.cache).argmax(-1)
        self.length += count

    def prefill(self, tokens: list[int]) -> None:
        self.length = 0
        self._forward(tokens)

    def decode(self, token: int) -> None:
        self._forward([token])


class Transformers:
    """transformers in bf16 with a dynamic cache and the given experts implementation."""

    def __init__(self, folder: Path, threads: int, experts: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True, experts_implementation=experts
        ).eval()
        self.cache: Any = None

    def _forward(self, tokens: list[int]) -> None:
        with self.torch.inference_mode():
            out = self.model(
                input_ids=self.torch.tensor([tokens]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        out.logits[0, -1].argmax(-1)

    def prefill(self, tokens: list[int]) -> None:
        self.cache = None
        self._forward(tokens)

    def decode(self, token: int) -> None:
        self._forward([token])


def _make(side: str, folder: Path, threads: int) -> Side:
    return Ours(folder, threads) if side == "ours" else Transformers(folder, threads, side)


def _work(side: str, folder: Path, threads: int, pipe: Connection) -> None:
    engine = _make(side, folder, threads)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        what, tokens = order
        if what == "prefill":
            start = time.perf_counter()
            engine.prefill(tokens)
            pipe.send(time.perf_counter() - start)
            continue
        engine.prefill(tokens[:DECODE_CONTEXT])
        times = []
        for token in tokens[DECODE_CONTEXT:]:
            start = time.perf_counter()
            engine.decode(token)
            times.append(time.perf_counter() - start)
        pipe.send(sorted(times)[len(times) // 2])


def main() -> None:
    """Load every side, alternate rounds, print and save medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", nargs="+", default=["ours", "grouped_mm", "eager"])
    arguments = parser.parse_args()
    rng = random.Random(1)
    context = mp.get_context("spawn")
    pipes: dict[str, Any] = {}
    workers = []
    for side in arguments.sides:
        pipes[side], theirs = context.Pipe()
        worker = context.Process(
            target=_work, args=(side, arguments.folder, arguments.threads, theirs), daemon=True
        )
        worker.start()
        workers.append(worker)
        print(side, pipes[side].recv(), flush=True)
    samples: dict[str, dict[str, list[float]]] = {side: {"prefill": [], "decode": []} for side in pipes}
    for round_number in range(arguments.rounds + 1):  # round 0 warms up and is thrown away
        for what, count in (("prefill", PROMPT_TOKENS), ("decode", DECODE_CONTEXT + DECODE_STEPS)):
            tokens = [rng.randrange(2, 32000) for _ in range(count)]
            for side, pipe in pipes.items():
                pipe.send((what, tokens))
                seconds = pipe.recv()
                if round_number:
                    samples[side][what].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)
    _report(samples, arguments.threads)


def _report(samples: dict[str, dict[str, list[float]]], threads: int) -> None:
    result: dict[str, Any] = {"machine": machine(), "threads": threads, "seconds": {}, "ratio": {}}
    for side, times in samples.items():
        result["seconds"][side] = {what: summary(values) for what, values in times.items()}
        prefill, decode = (result["seconds"][side][what]["median"] for what in ("prefill", "decode"))
        print(f"{side:>12}: prefill {PROMPT_TOKENS / prefill:8.1f} tok/s   decode {1 / decode:6.2f} tok/s")
    for what in ("prefill", "decode"):
        ours = samples.get("ours", {}).get(what)
        for side, times in samples.items():
            if ours and side != "ours":
                ratios = [theirs / mine for theirs, mine in zip(times[what], ours, strict=True)]
                result["ratio"][f"{what} over {side}"] = summary(ratios)
                print(f"ours / {side}, {what}: {summary(ratios)['median']:.2f}x")
    print("saved", save("versus_transformers", result))


if __name__ == "__main__":
    main()
