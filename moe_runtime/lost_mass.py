"""Lost mass: the part of a token's gate weight that goes to experts its scenario may not use.

The unmasked scores exist anyway, so asking them costs little, and the answer tells when traffic has left the
scenario that its mask was made for. A mean over tokens and layers, 0 to 1.

It is kept by cache slot, beside the keys and values it was measured with: a prompt whose beginning came from
the prefix cache has the lost mass of all its tokens, so that the answer depends on the prompt alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moe_runtime.kernels import RouteMeter
from moe_runtime.scheduler import Step
from moe_runtime.sequence import Sequence


class LostMass:
    """Measures the steps that have masks; the engine's thread only."""

    def __init__(self, model: Any, num_blocks: int, block_size: int) -> None:
        """``model``: its ``mixtures()`` are the layers with routers. The last decoder layer, which sees the
        tokens with logits alone, is not measured.
        """
        last = model.config.num_layers - 1
        self._num_layers = sum(number < last for number, _ in model.mixtures())
        self._device: torch.device = model.device
        self._by_slot = np.zeros((num_blocks, block_size), np.float32)
        self.num_outside = 0  # chosen experts outside a mask since the start; zero by construction

    def start(self, step: Step) -> RouteMeter | None:
        """For the step's forward pass; None where no chunk has a mask."""
        if all(chunk.mask_row < 0 for chunk in step.chunks):
            return None
        return RouteMeter.zeros(step.num_tokens, self._device)

    def read(self, step: Step, meter: RouteMeter, sequences: Mapping[int, Sequence]) -> None:
        """After the forward pass: what was lost, to each sequence by id."""
        self.num_outside += int(meter.outside)
        if meter.lost is None or not self._num_layers:
            return
        lost = meter.lost.numpy(force=True) / np.float32(self._num_layers)
        first = 0
        for chunk in step.chunks:  # a chunk may share the blocks of one before it in the same step
            new = lost[first : first + len(chunk.token_ids)]
            first += len(chunk.token_ids)
            if chunk.mask_row < 0:
                continue
            sequence = sequences[chunk.sequence_id]
            follows = sequence.num_measured == chunk.start >= sequence.num_prompt
            if follows and len(chunk.token_ids) == 1:  # a decode step has many of these: no arrays for them
                block, offset = divmod(chunk.start, self._by_slot.shape[1])
                self._by_slot[chunk.blocks[block], offset] = new[0]
                sequence.lost_sum += float(new[0])
                sequence.num_measured = chunk.end
                continue
            positions = np.arange(chunk.start, chunk.end)
            blocks, size = np.array(chunk.blocks), self._by_slot.shape[1]
            self._by_slot[blocks[positions // size], positions % size] = new
            if follows:
                sequence.lost_sum += float(new.sum(dtype=np.float64))
            else:
                known = self._by_slot[blocks].ravel()[: chunk.end]
                sequence.lost_sum = float(known.sum(dtype=np.float64))
            sequence.num_measured = chunk.end
