"""Batch: a Step as tensors. The only place that builds tensors from sequences."""

from dataclasses import dataclass, fields

import torch

from moe_runtime.scheduler import Step

ALIGNMENT = 16  # bytes


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
