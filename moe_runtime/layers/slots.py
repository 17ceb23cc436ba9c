"""A slot is one tensor the checkpoint must hold, and where it goes. Layers declare theirs; the loader fills
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

# What may be quantised apart from the rest. Embedding, router and norms belong to none and keep their
# precision.
Part = Literal["experts", "attention", "lm_head"]


@dataclass(frozen=True)
class Place:
    """The attribute of a layer where something loaded is kept: a tensor, PackedLinear or PackedExperts."""

    owner: Any
    attribute: str


@dataclass(frozen=True)
class Slot:
    """``write`` receives the weight once, in shape ``shape``; it must copy what it keeps of a tensor, which
    is a view of the mapped file.

    any_float  small tensors (norms, biases, routers) that may differ from the model's dtype; the others must
               have it, or a published quantised form, which the loader reads.
    part       ``write`` gets the weight in the format that the user chose for this part.
    keep       also receives the tensor, in the checkpoint's precision (an embedding that is the head too).
    float8     ``write`` takes float8 codes with block scales, too, if all that shares its place comes so.
    matrices   ``write`` gets a list instead: these matrices made of the tensor, each in the part's format.
    expert     which matrix of a mixture it is: the expert's id, and gate, up or down.
    absent     the checkpoint must hold the tensor, and nothing of it is read.
    places     where ``write`` and ``keep`` leave things, so that a packed file can save and restore them.
    """

    name: str
    shape: tuple[int, ...]
    write: Callable[[Any], None]
    any_float: bool = False
    part: Part | None = None
    keep: Callable[[torch.Tensor], None] | None = None
    float8: bool = False
    matrices: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None
    places: tuple[Place, ...] = ()
    expert: tuple[int, str] = (0, "")
    absent: bool = False


def is_separate(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``packed`` is memory apart from ``weight``."""
    return packed.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
