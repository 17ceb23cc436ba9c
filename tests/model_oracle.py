"""Runs a model the way the engine does (paged, chunked, many sequences per batch), for oracles to compare."""

from pathlib import Path

import torch
from devices import ComputeDevice

from moe_runtime.batch import Batch, no_masks
from moe_runtime.kernels import OPS, choose, triton_is_interpreted
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model

BLOCK_SIZE = 8
BACKENDS = [name for name in ("reference", "cpu") if all(name in row for row in OPS.values())]


def load(folder: Path, backend: str) -> Decoder:
    """``backend``: one of the op table's; "triton" is on the GPU, or in its interpreter."""
    if backend == "triton":
        device = ComputeDevice("interpreter" if triton_is_interpreted() else "cuda")
        return load_model(folder, device.kernels())
    return load_model(folder, choose(backend))


class Paged:
    """Sequences over a cache whose blocks are handed out in a scrambled order."""

    def __init__(self, model: Decoder, num_sequences: int, max_tokens: int) -> None:
        self.model = model
        blocks = -(-max_tokens // BLOCK_SIZE)
        order = torch.randperm(num_sequences * blocks, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(num_sequences, blocks).int()
        self.cache: Cache = model.new_cache(num_sequences * blocks, BLOCK_SIZE)
        self.lengths = [0] * num_sequences

    def forward(self, chunks: dict[int, torch.Tensor], last_only: bool = False) -> dict[int, torch.Tensor]:
        """Feed each sequence its next tokens, all in one batch; logits of the new tokens per sequence."""
        rows = {
            row: torch.arange(self.lengths[row], self.lengths[row] + len(ids)) for row, ids in chunks.items()
        }
        positions = torch.cat(list(rows.values()))
        table_rows = torch.cat([torch.full((len(ids),), i) for i, ids in enumerate(chunks.values())])
        tables = self.tables[list(chunks)]
        slots = tables[table_rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        sizes = [len(ids) for ids in chunks.values()]
        ends = torch.tensor(sizes).cumsum(0) - 1
        batch = Batch(
            token_ids=torch.cat(list(chunks.values())),
            positions=positions.int(),
            slots=slots,
            sequence_rows=table_rows.int(),
            block_tables=tables,
            logit_rows=ends if last_only else torch.arange(len(positions)),
            mask_rows=no_masks(len(positions)),
        )
        logits = self.model.forward(batch, self.cache).cpu()
        for row, ids in chunks.items():
            self.lengths[row] += len(ids)
        return dict(zip(chunks, logits.split([1] * len(sizes) if last_only else sizes), strict=True))


def chunked_logits(model: Decoder, prompts: list[torch.Tensor], chunk: int = 11) -> list[torch.Tensor]:
    """Logits of every prompt token; prompts advance side by side, later ones by smaller chunks, so that
    batches mix beginnings, middles and ends."""
    paged = Paged(model, len(prompts), max(len(ids) for ids in prompts))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(paged.lengths[row] < len(ids) for row, ids in enumerate(prompts)):
        chunks = {}
        for row, ids in enumerate(prompts):
            part = ids[paged.lengths[row] :][: chunk - 3 * row]
            if len(part):
                chunks[row] = part
        for row, logits in paged.forward(chunks).items():
            parts[row].append(logits)
    return [torch.cat(part) for part in parts]


def greedy(model: Decoder, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """The most likely continuation, token by token."""
    paged = Paged(model, 1, len(prompt) + num_tokens)
    chunk, out = prompt, []
    for _ in range(num_tokens):
        token = int(paged.forward({0: chunk}, last_only=True)[0].argmax())
        out.append(token)
        chunk = torch.tensor([token])
    return out
