"""Batch: a Step as tensors. The only place that builds tensors from sequences."""

from dataclasses import dataclass, fields

import torch

from moe_runtime.kernels.packed import NOBODY
from moe_runtime.scheduler import Step

ALIGNMENT = 16  # bytes
NO_SLOT, NO_POSITION = -1, -1  # of rows that pad a batch, whose mask row is NOBODY


def no_masks(num_tokens: int) -> torch.Tensor:
    """``Batch.mask_rows`` of tokens that may use every expert."""
    return torch.full((num_tokens,), -1, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of S sequences, R of them with logits. Passed down through the model, never changed.

    token_ids      int64 [T]
    positions      int32 [T]               place of each token in its sequence
    slots          int64 [T]               where its keys and values go: block * block_size + offset
    sequence_rows  int32 [T]               row of ``block_tables`` of each token, ascending
    block_tables   int32 [S, max_blocks]   blocks of each sequence in order, padded with 0
    logit_rows     int64 [R]               rows of T whose logits are wanted, ascending
    mask_rows      int32 [T]               which row of the layers' mask tables each token obeys, -1: none
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sequence_rows: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    mask_rows: torch.Tensor

    @classmethod
    def of_nobody(cls, num_tokens: int, max_blocks: int) -> "Batch":
        """A decode batch of rows that only pad. The Triton kernels write no cache for their slots, see
        nothing from their positions and choose no expert for their mask rows; others refuse such a batch.
        """
        rows = torch.arange(num_tokens)
        return cls(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.full((num_tokens,), NO_POSITION, dtype=torch.int32),
            slots=torch.full((num_tokens,), NO_SLOT),
            sequence_rows=rows.int(),
            block_tables=torch.zeros(num_tokens, max_blocks, dtype=torch.int32),
            logit_rows=rows,
            mask_rows=torch.full((num_tokens,), NOBODY, dtype=torch.int32),
        )

    @property
    def is_decode(self) -> bool:
        """Whether every token is its sequence's only one, and all have logits."""
        return len(self.token_ids) == len(self.block_tables) == len(self.logit_rows)

    def padded(self, num_tokens: int, max_blocks: int) -> "Batch":
        """Of a decode batch one of this size: what is new belongs to nobody."""
        rows, blocks = self.block_tables.shape
        larger = Batch.of_nobody(num_tokens, max_blocks)
        for part, new in zip(self._parts(), larger._parts(), strict=True):
            if part.dim() == 1:
                new[:rows] = part
        larger.block_tables[:rows, :blocks] = self.block_tables
        return larger

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``; itself if it is there. All fields travel in one copy, for which the host
        does not wait.
        """
        if self.token_ids.device == device:
            return self
        # The pinned bytes are not used again before the copy is done: torch sees to it.
        return self.on(self.staged(pinned=device.type == "cuda").to(device, non_blocking=True))

    def staged(self, *, pinned: bool) -> torch.Tensor:
        """All fields in one run of bytes on the CPU."""
        places = self._places()
        run = torch.empty(places[-1].stop, dtype=torch.uint8, pin_memory=pinned)
        for place, part in zip(places, self._parts(), strict=True):
            run[place].view(part.dtype).copy_(part.flatten())
        return run

    def on(self, run: torch.Tensor) -> "Batch":
        """A batch of this one's sizes whose fields are views of ``run``, bytes as ``staged`` makes them."""
        return Batch(
            *(
                run[place].view(part.dtype).view(part.shape)
                for place, part in zip(self._places(), self._parts(), strict=True)
            )
        )

    def _parts(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def _places(self) -> list[slice]:
        """Where each field is among the bytes. Kernels are compiled per alignment they meet: one."""
        places, start = [], 0
        for part in self._parts():
            size = part.numel() * part.element_size()
            places.append(slice(start, start + size))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return places

    @classmethod
    def build(cls, step: Step, block_size: int) -> "Batch":
        """``step`` has at least one chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequence_rows: list[int] = []
        logit_rows: list[int] = []
        mask_rows: list[int] = []
        for row, chunk in enumerate(step.chunks):
            logit_rows.extend(
                range(len(token_ids) + chunk.logit_start - chunk.start, len(token_ids) + len(chunk.token_ids))
            )
            token_ids.extend(chunk.token_ids)
            for position in range(chunk.start, chunk.end):
                positions.append(position)
                slots.append(chunk.blocks[position // block_size] * block_size + position % block_size)
            sequence_rows.extend([row] * len(chunk.token_ids))
            mask_rows.extend([chunk.mask_row] * len(chunk.token_ids))
        max_blocks = max(len(chunk.blocks) for chunk in step.chunks)
        tables = [[*chunk.blocks, *[0] * (max_blocks - len(chunk.blocks))] for chunk in step.chunks]
        return cls(
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int64),
            sequence_rows=torch.tensor(sequence_rows, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
            mask_rows=torch.tensor(mask_rows, dtype=torch.int32),
        )
