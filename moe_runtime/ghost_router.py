"""An exported checkpoint read as the model that it was cut from, most of whose experts are absent.

`moe-experts export --ghost-router` keeps the routers' rows of the experts that were cut. With them such a
checkpoint is a physical subset like any other: one mask allows the experts that are there, everything that
knows of masks (fence, lost mass, policies) works, and the answers are bit for bit those of the checkpoint
alone, whose own rows have to be among the ghosts' byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_runtime.checkpoint import Checkpoint, TensorEntry, read_header
from moe_runtime.errors import CheckpointError
from moe_runtime.layers.assemble import ModelNames
from moe_runtime.plan import ExpertMask, LayerMask


@dataclass(frozen=True)
class GhostRouter:
    """mask    which experts of the uncut model the checkpoint has: number n there is ``kept[n]``
    config  fields of config.json that the cut changed -> what they were before, None for one that was absent
    path    safetensors file with the uncut routers' tensors under their own names
    """

    mask: ExpertMask
    config: Mapping[str, Any]
    path: Path

    def uncut(self, values: Mapping[str, object]) -> dict[str, object]:
        """config.json of the uncut model from that of the checkpoint."""
        return {key: value for key, value in {**values, **self.config}.items() if value is not None}

    def apply(self, checkpoint: Checkpoint, names: ModelNames) -> None:
        """Give the experts of ``checkpoint`` their old numbers and its routers all their rows; what was cut
        is left out. Raises CheckpointError for ghosts of another model.
        """
        ghosts = {entry.name: entry for entry in read_header(self.path)}
        layers = {layer.layer: layer for layer in self.mask.layers}
        name = _Names(names)
        entries: dict[str, TensorEntry] = {}
        for entry in checkpoint.entries.values():
            found = name.split(entry.name)
            layer = None if found is None else layers.get(found[0])
            if found is None or layer is None:
                new = entry
            elif found[1] in name.router_rows:
                if entry.name not in ghosts:
                    raise self._refuse(entry.name, "is missing")
                new = ghosts.pop(entry.name)
                self._check_rows(checkpoint, entry, new, layer)
            else:
                new = replace(entry, name=name.renumbered(entry, layer))
            entries[new.name] = new
        if ghosts:
            raise self._refuse(min(ghosts), "no router of this checkpoint")
        checkpoint.entries = entries
        for layer in self.mask.layers:
            checkpoint.left_out.update(dict.fromkeys(name.absent(layer), "the uncut model"))

    def _check_rows(
        self, checkpoint: Checkpoint, own: TensorEntry, ghost: TensorEntry, layer: LayerMask
    ) -> None:
        expected = (layer.num_experts, *own.shape[1:])
        if (ghost.dtype, ghost.shape) != (own.dtype, expected) or own.shape[0] != len(layer.kept):
            shape = f"{ghost.dtype} {list(ghost.shape)}, expected {own.dtype} {list(expected)}"
            raise self._refuse(ghost.name, shape)
        rows = checkpoint.read(ghost)[list(layer.kept)].contiguous().view(torch.uint8)
        if not torch.equal(rows, checkpoint.read(own).contiguous().view(torch.uint8)):
            raise self._refuse(ghost.name, "its rows of the experts that stayed are not the checkpoint's")

    def _refuse(self, tensor: str, message: str) -> CheckpointError:
        return CheckpointError(
            f"{message}; the file is not of this checkpoint: export again, or remove it to serve without",
            file=self.path.name,
            tensor=tensor,
        )


class _Names:
    """What a family calls the tensors of a layer with a router."""

    def __init__(self, names: ModelNames) -> None:
        self._layer, self._experts, self._parts = names.decoder.layer, names.moe.experts, names.moe.parts
        prefix = re.escape(self._layer).replace(r"\{\}", r"(\d{1,6})")
        self._of_layer = re.compile(rf"{prefix}\.(.+)")
        self._of_expert = re.compile(rf"{re.escape(self._experts)}\.(\d{{1,6}})\.(.+)")
        gate = names.moe.gate
        self.router_rows = frozenset((f"{gate}.weight", f"{gate}.bias", names.moe.selection_bias))

    def split(self, name: str) -> tuple[int, str] | None:
        """Layer and rest of the name, if it is of a layer."""
        match = self._of_layer.fullmatch(name)
        return None if match is None else (int(match[1]), match[2])

    def renumbered(self, entry: TensorEntry, layer: LayerMask) -> str:
        """The name in the uncut model. Raises CheckpointError for an expert that cannot be there."""
        match = self._of_expert.fullmatch(entry.name.removeprefix(f"{self._prefix(layer)}."))
        if match is None:
            return entry.name
        if int(match[1]) >= len(layer.kept):
            message = f"{len(layer.kept)} experts of this layer were exported"
            raise CheckpointError(message, file=entry.path.name, tensor=entry.name)
        return f"{self._prefix(layer)}.{self._experts}.{layer.kept[int(match[1])]}.{match[2]}"

    def absent(self, layer: LayerMask) -> Iterator[str]:
        """Names, without their last part, of the matrices that were cut."""
        for expert in sorted({*range(layer.num_experts)} - {*layer.kept}):
            for part in self._parts:
                yield f"{self._prefix(layer)}.{self._experts}.{expert}.{part}"

    def _prefix(self, layer: LayerMask) -> str:
        return self._layer.format(layer.layer)
