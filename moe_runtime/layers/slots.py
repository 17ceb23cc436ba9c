"""A slot is one tensor the checkpoint must hold, and where it goes. Layers declare theirs; the loader fills
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """``write`` receives the tensor once, in shape ``shape``; it must copy what it keeps, as the tensor is a
    view of the mapped file. ``any_float``: small tensors (norms, biases, routers) that may differ from the
    model's dtype; the others must have it, or float8 with block scales, which the loader widens first.
    """

    name: str
    shape: tuple[int, ...]
    write: Callable[[torch.Tensor], None]
    any_float: bool = False


def is_separate(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``packed`` is memory apart from ``weight``."""
    return packed.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
