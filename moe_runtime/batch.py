"""Batch: a Step as tensors. The only place that builds tensors from sequences."""

from dataclasses import dataclass

import torch

from moe_runtime.scheduler import Step


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of S sequences, R of them with logits. Passed down through the model, never changed.

    token_ids      int64 [T]
    positions      int32 [T]               place of each token in its sequence
    slots          int64 [T]               where its keys and values go: block * block_size + offset
    sequence_rows  int32 [T]               row of ``block_tables`` of each token, ascending
    block_tables   int32 [S, max_blocks]   blocks of each sequence in order, padded with 0
    logit_rows     int64 [R]               rows of T whose logits are wanted, ascending
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sequence_rows: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor

    @classmethod
    def build(cls, step: Step, block_size: int) -> "Batch":
        """``step`` has at least one chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequence_rows: list[int] = []
        logit_rows: list[int] = []
        for row, chunk in enumerate(step.chunks):
            logit_rows.extend(
                range(len(token_ids) + chunk.logit_start - chunk.start, len(token_ids) + len(chunk.token_ids))
            )
            token_ids.extend(chunk.token_ids)
            for position in range(chunk.start, chunk.end):
                positions.append(position)
                slots.append(chunk.blocks[position // block_size] * block_size + position % block_size)
            sequence_rows.extend([row] * len(chunk.token_ids))
        max_blocks = max(len(chunk.blocks) for chunk in step.chunks)
        tables = [[*chunk.blocks, *[0] * (max_blocks - len(chunk.blocks))] for chunk in step.chunks]
        return cls(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int64),
            sequence_rows=torch.tensor(sequence_rows, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )
