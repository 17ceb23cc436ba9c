"""A recovery on disk: recovery.safetensors, one tensor "layer.<number>" per layer, hashed as a whole.

The header says in JSON which plan and model it is for, and what it was made from. A few MB at most; what it
holds is float32 numbers and no code.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import moe_runtime
from moe_runtime.checkpoint import open_regular
from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.experts.documents import command_line
from moe_runtime.experts.fingerprints import Hashes
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.whole_file import replacing
from moe_runtime.hf_config import parse_json
from moe_runtime.recovery import Recovery

FORMAT = 1
HEADER = "moe_experts_recovery"  # one entry: safetensors keeps several in no fixed order
LAYER = re.compile(r"layer\.(0|[1-9][0-9]{0,5})")
FINGERPRINTS = "fingerprints"
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class RecoveryFile:
    """recovery      the numbers
    plan         digest of the plan's document
    mask_digest  of the plan's mask
    model        what both were made for
    made         how it was made, as JSON: what ``recover --json`` tells
    fingerprints int64 [N], ascending: of the texts that it was made from besides the plan's own
    digest       of the file's content, empty before it is one
    """

    recovery: Recovery
    plan: str
    mask_digest: str
    model: ModelIdentity
    made: Mapping[str, Any]
    fingerprints: Hashes = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    digest: str = ""

    @property
    def kind(self) -> str:
        return self.recovery.kind

    @property
    def num_bytes(self) -> int:
        """Of its numbers: what a server holds more."""
        return sum(numbers.nbytes for numbers in self.recovery.layers.values())

    def save(self, path: Path) -> RecoveryFile:
        """Write it whole or not at all; the same with its digest. Raises PlanError when the disk refuses."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "tool": moe_runtime.__version__,
            "command": command_line(sys.argv),
            "kind": self.kind,
            "plan": self.plan,
            "mask_digest": self.mask_digest,
            "model": self.model.to_json(),
            "made": dict(self.made),
        }
        tensors = {
            f"layer.{layer}": each.contiguous() for layer, each in sorted(self.recovery.layers.items())
        }
        tensors[FINGERPRINTS] = torch.from_numpy(self.fingerprints)
        header["digest"] = _digest(header, tensors)
        with replacing(path) as file:
            file.write(save(tensors, {HEADER: json.dumps(header, sort_keys=True)}))
        return replace(self, digest=header["digest"])

    @classmethod
    def load(cls, path: Path, plan: PlanFile) -> RecoveryFile:
        """Raises PlanError for a file that cannot be read, was changed, is of another format, or belongs to
        another plan or model than ``plan`` and its.
        """
        try:
            header, tensors = _read(path)
            digest = header.pop("digest")
            if header["format"] != FORMAT:
                raise PlanError(f"{path.name}: format {header['format']!r}, this version reads {FORMAT}")
            if digest != _digest(header, tensors):
                raise PlanError(f"{path.name}: it was changed since it was written; make it again")
            found = cls(
                recovery=Recovery(header["kind"], _layers(tensors)),
                plan=header["plan"],
                mask_digest=header["mask_digest"],
                model=ModelIdentity.from_json(header["model"]),
                made=header["made"],
                fingerprints=tensors[FINGERPRINTS].numpy(),
                digest=digest,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path.name}: not a file of `moe-experts recover`: {error!r}") from error
        found._check(path.name, plan)
        return found

    def _check(self, name: str, plan: PlanFile) -> None:
        plan.model.check(self.model, name)
        if (self.plan, self.mask_digest) != (plan.digest, plan.mask.digest):
            raise PlanError(
                f"{name} was made for another plan ({self.plan[:12]}, this one is {plan.digest[:12]}); run "
                "`moe-experts recover` again"
            )
        try:
            self.recovery.check(plan.mask)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Its bytes are read once: tensors of a mapped file would change, or end a server with SIGBUS, when the
    file is overwritten or cut short after its digest was checked.
    """
    try:
        if not path.is_file():
            raise PlanError(f"{path.name}: no such file; `moe-experts recover` makes one")
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise PlanError(f"{path.name}: larger than {MAX_FILE_BYTES} bytes, which no recovery is")
        tensors = load(data)
        about: Any = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = parse_json(about["__metadata__"][HEADER].encode())
    except (OSError, CheckpointError, SafetensorError, ValueError) as error:
        raise PlanError(f"{path.name}: not a recovery file: {error}") from error
    if not isinstance(header, dict):
        raise PlanError(f"{path.name}: its header is not an object")
    return header, tensors


def _layers(tensors: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    names = {name: LAYER.fullmatch(name) for name in tensors if name != FINGERPRINTS}
    return {int(match[1]): tensors[name] for name, match in names.items() if match is not None}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hexadecimal, of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
