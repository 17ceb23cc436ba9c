"""Our side of peers.py: the engine's model on batches built by hand, in the environment of the project."""

import time
from pathlib import Path
from typing import Any

import torch
from worker import arguments, serve  # type: ignore[import-not-found]

import moe_runtime
from moe_runtime import _C
from moe_runtime.batch import Batch, no_masks
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine

BLOCK = 16
BLOCKS_PER_SEQUENCE = 64  # 1024 tokens


class Ours:
    """Sequence b owns blocks [64 b, 64 b + 64) of the cache."""

    def __init__(self, options: dict[str, Any]) -> None:
        config = EngineConfig(
            threads=options["threads"],
            block_size=BLOCK,
            num_blocks=BLOCKS_PER_SEQUENCE,
            quantize=options["quantize"],
            quantize_group=options["group"],
            packed_dir=Path(options["packed"]),
        )
        self.model = Engine.load(options["folder"], config).model
        torch.set_num_threads(1)  # our pool does the work
        self.cache = self.model.new_cache(16 * BLOCKS_PER_SEQUENCE, BLOCK)
        self.info = {
            "version": getattr(moe_runtime, "__version__", ""),
            "torch": torch.__version__,
            "isa": _C.isa(),
            "flags": {
                "quantize": options["quantize"],
                "quantize_group": options["group"],
                "threads": options["threads"],
            },
        }

    def _forward(self, tokens: list[list[int]], start: int) -> None:
        """``tokens[b]`` become positions ``start`` and on of sequence b; logits of each one's last token."""
        count, rows = len(tokens[0]), len(tokens)
        positions = torch.arange(start, start + count).repeat(rows)
        sequence_rows = torch.arange(rows).repeat_interleave(count)
        batch = Batch(
            token_ids=torch.tensor(tokens).view(-1),
            positions=positions.int(),
            slots=sequence_rows * (BLOCKS_PER_SEQUENCE * BLOCK) + positions,
            sequence_rows=sequence_rows.int(),
            block_tables=torch.arange(rows * BLOCKS_PER_SEQUENCE).view(rows, -1).int(),
            logit_rows=torch.arange(1, rows + 1) * count - 1,
            mask_rows=no_masks(rows * count),
        )
        self.model.forward(batch, self.cache).argmax(-1)

    def prefill(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        self._forward([tokens], 0)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: list[list[int]]) -> list[float]:
        length = len(prompts[0])
        self._forward(prompts, 0)
        seconds = []
        for index, tokens in enumerate(steps):
            start = time.perf_counter()
            self._forward([[token] for token in tokens], length + index)
            seconds.append(time.perf_counter() - start)
        return seconds


if __name__ == "__main__":
    serve(lambda: Ours(arguments()))
