"""What the user wants in integers, and the step between a weight as read and a weight as a layer packs it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe_runtime.config import PARTS, EngineConfig, quantized_parts
from moe_runtime.kernels import QuantizedWeight, Weight, WeightFormat
from moe_runtime.layers.slots import Part, Slot
from moe_runtime.quant.rounding import quantize

# Of the way from a checkpoint's bytes to what the kernels pack: this package but for rounding.py, which has
# its own version, and the layers' ``matrices`` and ``write``. Packed files keep the results: whoever changes
# what comes out there for any checkpoint (a number, the order of stacked rows, a weight's part) adds one, and
# every file is packed anew.
CONVERSION_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """``formats``: for each part of the model that is to be quantised, how. ``moments``: by tensor name,
    E[x_k^2] of the weight's input, float32 [K], where they were measured (statistics.py).

    Weights that the checkpoint holds in 4 bits stay as they were published, whatever the formats say.
    """

    formats: Mapping[Part, WeightFormat] = field(default_factory=dict)
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EngineConfig) -> "Recipe":
        formats: dict[Part, WeightFormat] = {}
        for part, kind in quantized_parts(config.quantize).items():
            if kind == "int8":
                formats[part] = WeightFormat("int8")
            elif kind == "int4":
                formats[part] = WeightFormat("int4", config.quantize_group, config.quantize_zeros)
        return cls(formats)

    @property
    def label(self) -> str:
        """A short name, fit for a file: ``int4-g128``, ``experts-int4-g128_lm_head-int8``, ``plain``."""
        names = [str(self.formats[part]) for part in PARTS if part in self.formats]
        if not (len(names) == len(PARTS) and len(set(names)) == 1):
            names = [f"{part}-{self.formats[part]}" for part in PARTS if part in self.formats] or ["plain"]
        else:
            names = names[:1]
        return "_".join(names) + ("_weighted" if self.moments else "")

    def describe(self) -> dict[str, str]:
        """All that its results follow from, as plain JSON."""
        digest = hashlib.sha256()
        for name, moments in sorted(self.moments.items()):
            digest.update(name.encode() + moments.numpy().tobytes())
        formats = {str(part): str(weight_format) for part, weight_format in sorted(self.formats.items())}
        return formats | {"moments": digest.hexdigest()}

    def convert(self, slot: Slot, weight: Weight, dtype: torch.dtype) -> "Converted":
        """``weight`` in the format wanted for its slot. ``dtype`` is the model's."""
        kept = None if slot.keep is None else widened(weight, dtype)
        if slot.matrices is not None:
            matrices = [self._in_format(slot, matrix) for matrix in slot.matrices(widened(weight, dtype))]
            return Converted(slot, matrices, kept)
        written = widened(weight, dtype) if slot.part is None else self._in_format(slot, weight)
        return Converted(slot, [written], kept)

    def format_of(self, slot: Slot, stored: WeightFormat) -> WeightFormat:
        """The format in which a slot's weight is kept that is ``stored`` in another."""
        wanted = self.formats.get(slot.part) if slot.part is not None else None
        return stored if wanted is None or not stored.is_plain else wanted

    def _in_format(self, slot: Slot, weight: Weight) -> Weight:
        wanted = self.formats.get(slot.part) if slot.part is not None else None
        if wanted is None or isinstance(weight, QuantizedWeight):
            return weight
        return quantize(weight, wanted, self.moments.get(slot.name))


@dataclass(frozen=True)
class Converted:
    """What a slot is to receive."""

    slot: Slot
    written: Sequence[Weight]  # one, unless the slot wants several matrices
    kept: torch.Tensor | None

    def hand_over(self) -> None:
        if self.slot.keep is not None and self.kept is not None:
            self.slot.keep(self.kept)
        self.slot.write(self.written[0] if self.slot.matrices is None else self.written)

    @property
    def num_bytes(self) -> int:
        weights = {id(weight): weight for weight in (*self.written, self.kept) if weight is not None}
        return sum(size_of(weight) for weight in weights.values())


def widened(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize().to(dtype) if isinstance(weight, QuantizedWeight) else weight


def size_of(weight: Weight) -> int:
    """Bytes of the numbers themselves, packed, without padding."""
    if isinstance(weight, QuantizedWeight):
        return round(weight.codes.numel() * weight.format.bits_per_weight / 8)
    return int(weight.numel() * weight.element_size())
