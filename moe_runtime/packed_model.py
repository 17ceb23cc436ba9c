"""A loaded model as named arrays, and back: what a packed file holds of it.

Every place a slot fills (layers/slots.py) is saved under its slot's name, so whatever a layer keeps there is
restored without reading the checkpoint.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from moe_runtime.kernels import PackedExperts, PackedLinear, WeightFormat
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.slots import Place
from moe_runtime.packed_file import TABLE_ERRORS, Array, PackedFile, PackedFileError, table_error

DTYPES = ("bfloat16", "float16", "float32")


def save(model: Decoder) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays of a model, and what else ``restore`` needs (plain JSON)."""
    arrays: dict[str, Array] = {}
    described: dict[str, Any] = {}
    for name, place in _places(model):
        kept = getattr(place.owner, place.attribute)
        described[name] = _describe(kept)
        for part, tensor in _tensors(kept).items():
            # An expert has checksums of its own: who keeps a few experts need not read the others to check
            # them.
            block = tensor[0].numel() if isinstance(kept, PackedExperts) else 0
            arrays[f"{name}/{part}"] = Array(tensor, block) if block else Array(tensor)
    values = {"dtype": model.config.dtype, "weight_bytes": model.config.weight_bytes, "places": described}
    return arrays, values


def restore(model: Decoder, file: PackedFile) -> None:
    """Fill a model that has no weights yet. Raises PackedFileError when the file does not fit it; the model
    is then of no use.
    """
    try:
        _fill(model, file)
    except TABLE_ERRORS as error:
        raise table_error(error) from error


def stored_dtype(file: PackedFile) -> str:
    """The dtype of the model that was saved. Raises PackedFileError."""
    dtype = file.values.get("dtype")
    if dtype not in DTYPES:
        raise PackedFileError(f"its table does not fit this program: dtype {str(dtype)[:40]!r}")
    return str(dtype)


def is_packed(model: Decoder) -> bool:
    """Whether all weights are in the layout of csrc/layout.h: rows of other backends are not kept in
    files.
    """
    kept = [getattr(place.owner, place.attribute) for _, place in _places(model)]
    return all(isinstance(item, torch.Tensor) or item.layout == "panels" for item in kept if item is not None)


def _fill(model: Decoder, file: PackedFile) -> None:
    places = dict(_places(model))
    described = file.values["places"]
    if places.keys() != described.keys():
        different = sorted(places.keys() ^ described.keys())[0]
        raise PackedFileError(f"it holds other weights than the model has: {different}")
    for name, place in places.items():
        parts = {part: file.arrays[f"{name}/{part}"] for part in described[name]["parts"]}
        setattr(place.owner, place.attribute, _rebuild(described[name], parts))
    model.config = replace(model.config, weight_bytes=int(file.values["weight_bytes"]))


def _places(model: Decoder) -> Iterator[tuple[str, Place]]:
    """Each place once, under the name of the first slot that fills it."""
    seen = set()
    for slot in model.slots():
        for number, place in enumerate(slot.places):
            key = (id(place.owner), place.attribute)
            if key not in seen:
                seen.add(key)
                yield f"{slot.name}/{number}", place


def _tensors(kept: Any) -> dict[str, torch.Tensor]:
    if isinstance(kept, PackedLinear):
        return {"data": kept.data}
    if isinstance(kept, PackedExperts):
        return {"gate_up": kept.gate_up, "down": kept.down}
    return {"tensor": kept}


def _describe(kept: Any) -> dict[str, Any]:
    parts = _tensors(kept)
    fields = (
        {}
        if isinstance(kept, torch.Tensor)
        else {
            name: asdict(value) if isinstance(value, WeightFormat) else value
            for name, value in vars(kept).items()
            if name not in parts
        }
    )
    return {"kind": type(kept).__name__, "parts": list(parts), "fields": fields}


def _rebuild(described: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> Any:
    fields = dict(described["fields"])
    if "format" in fields:
        fields["format"] = WeightFormat(**fields["format"])
    if described["kind"] == "PackedLinear":
        return PackedLinear(**fields, **parts)
    if described["kind"] == "PackedExperts":
        return PackedExperts(**fields, **parts)
    return parts["tensor"]
