"""What scenarios do about the experts that their masks forbid, as the routers' data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RouteRecovery:
    """By row of a layer's masks, of which there are M, over E experts; on the kernels' device.

    offsets    float32 [M, E]: added to the logits of the tokens of the row, before anything else; the lost
               weight is measured without them
    stand_ins  int32 [M, E]: which constant vector stands in for an expert that the row's mask forbids, -1 for
               none. An expert with one is in the race, and its id is E + that number when it has won
    """

    offsets: torch.Tensor
    stand_ins: torch.Tensor
