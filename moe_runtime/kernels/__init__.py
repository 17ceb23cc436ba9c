"""One table says which function computes each operation on each backend; ``choose`` turns it into a Kernels.

``cpu`` is the C++ extension (csrc/), ``reference`` is literal torch, ``triton`` runs on a GPU and is imported
only when it is chosen. Nothing here is global state: a model holds the Kernels it was loaded with. What each
operation means is written once, in reference.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from moe_runtime.errors import ConfigError, IsaUnavailable
from moe_runtime.kernels import cpu, packing, reference, residence, sampler
from moe_runtime.kernels.cpu import set_num_threads
from moe_runtime.kernels.fusions import FusedOperations, Fusions
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import (
    PackedExperts,
    PackedLinear,
    QuantizedWeight,
    RouterSpec,
    Weight,
    WeightFormat,
)
from moe_runtime.kernels.residence import Residence

__all__ = [
    "OPS",
    "Kernels",
    "PackedExperts",
    "PackedLinear",
    "QuantizedWeight",
    "Residence",
    "RouteMeter",
    "RouterSpec",
    "Weight",
    "WeightFormat",
    "choose",
    "set_num_threads",
    "triton_is_interpreted",
]

Operation = Callable[..., Any]
CPU = torch.device("cpu")
BACKENDS = ("auto", "cpu", "reference", "triton")


@dataclass(frozen=True)
class TritonOperation:
    """A function of kernels/triton/<file>.py, imported when it is asked for: that imports triton."""

    file: str
    name: str

    def load(self) -> Operation:
        module = importlib.import_module(f"moe_runtime.kernels.triton.{self.file}")
        operation: Operation = getattr(module, self.name)
        return operation


def _row(
    cpu_function: Operation, reference_function: Operation, triton_file: str
) -> Mapping[str, Operation | TritonOperation]:
    lazy = TritonOperation(triton_file, reference_function.__name__)
    return MappingProxyType({"cpu": cpu_function, "reference": reference_function, "triton": lazy})


OPS: Mapping[str, Mapping[str, Operation | TritonOperation]] = MappingProxyType(
    {
        "pack_linear": _row(packing.pack_linear, reference.pack_linear, "weights"),
        "pack_linear_heads": _row(packing.pack_linear_heads, reference.pack_linear_heads, "weights"),
        "new_experts": _row(packing.new_experts, reference.new_experts, "weights"),
        "pack_expert": _row(packing.pack_expert, reference.pack_expert, "weights"),
        "linear": _row(cpu.linear, reference.linear, "linear"),
        "linear_heads": _row(cpu.linear_heads, reference.linear_heads, "linear"),
        "fused_moe": _row(cpu.fused_moe, reference.fused_moe, "fused_moe"),
        "expert_moments": _row(cpu.expert_moments, reference.expert_moments, "fused_moe"),
        "expert_slots": _row(cpu.expert_slots, residence.expert_slots, "residence"),
        "silu_mul": _row(cpu.silu_mul, reference.silu_mul, "linear"),
        "route": _row(cpu.route, reference.route, "router"),
        "rms_norm": _row(cpu.rms_norm, reference.rms_norm, "norm"),
        "add_rms_norm": _row(cpu.add_rms_norm, reference.add_rms_norm, "norm"),
        "rope": _row(cpu.rope, reference.rope, "rope"),
        "write_cache": _row(cpu.write_cache, reference.write_cache, "rope"),
        "attention": _row(cpu.attention, reference.attention, "attention"),
    }
)

# A packed layout is read by one backend only, so packing follows the operation that reads it.
PACKED_FOR: Mapping[str, str] = MappingProxyType(
    {
        "pack_linear": "linear",
        "pack_linear_heads": "linear_heads",
        "new_experts": "fused_moe",
        "pack_expert": "fused_moe",
    }
)
# These read what another operation reads, so they follow it, too.
FOLLOWS: Mapping[str, str] = MappingProxyType({**PACKED_FOR, "expert_moments": "fused_moe"})


@dataclass(frozen=True)
class Kernels(FusedOperations):
    """The chosen function for each operation; signatures and meanings are those of reference.py."""

    backend: str
    pack_linear: Operation
    linear: Operation
    pack_linear_heads: Operation
    linear_heads: Operation
    new_experts: Operation
    pack_expert: Operation
    fused_moe: Operation
    expert_moments: Operation
    expert_slots: Operation
    silu_mul: Operation
    route: Operation
    rms_norm: Operation
    add_rms_norm: Operation
    rope: Operation
    write_cache: Operation
    attention: Operation
    choose_token: Operation | None  # the draw of a token, where there is a faster one than sampling.py's
    device: torch.device = CPU  # where weights, caches and activations live
    float8: bool = (
        False  # whether weights are multiplied as published in float8, else they have to be widened
    )
    fused: Fusions | None = None  # the backend's own form of FusedOperations
    sample_rows: Operation | None = None  # tokens chosen where the logits are, else they go to the host

    def all_from(self, backend: str) -> bool:
        """Whether every operation is this backend's, cpu or reference, none overridden."""
        return all(getattr(self, name) is row[backend] for name, row in OPS.items())


def choose(
    backend: str = "auto",
    overrides: Mapping[str, str] = MappingProxyType({}),
    *,
    device: torch.device = CPU,
) -> Kernels:
    """The functions of one backend, with single operations overridden, e.g. ``{"attention": "reference"}``.

    On a GPU ``device`` they are all Triton's. On the CPU "auto" is "cpu" on a machine with AVX2, else
    "reference"; "triton" runs there in its interpreter alone. Packing follows the operation that reads it.
    Raises ConfigError for a backend or operation that does not exist or does not run on ``device``,
    IsaUnavailable for "cpu" on a machine without AVX2 or a MOE_FORCE_ISA that it cannot run.
    """
    wanted = {backend, *overrides.values()}
    if unknown := sorted(wanted - {*BACKENDS}):
        raise ConfigError(f"backend = {unknown[0]!r}, expected one of {', '.join(BACKENDS)}")
    if unknown := sorted(name for name in overrides if name not in OPS or name in FOLLOWS):
        choices = sorted(set(OPS) - set(FOLLOWS))
        raise ConfigError(f"no operation {unknown[0]!r} to override, expected one of {choices}")
    if device.type == "cpu":
        fastest = _fastest_on_cpu(wanted)
    elif misplaced := sorted(wanted - {"auto", "triton"}):
        raise ConfigError(f"backend = {misplaced[0]!r} computes on the CPU, not on {device}; use 'triton'")
    else:
        fastest, device = "triton", torch.device(device.type, device.index or 0)

    def resolve(name: str) -> str:
        return fastest if name == "auto" else name

    chosen = {
        name: _resolved(name, row[resolve(overrides.get(FOLLOWS.get(name, name), backend))], device)
        for name, row in OPS.items()
    }
    chooser = sampler.choose_token if resolve(backend) == "cpu" else None
    float8 = all(resolve(overrides.get(name, backend)) == "triton" for name in ("linear", "fused_moe"))
    everywhere = {resolve(name) for name in wanted}
    fused = TritonOperation("fusions", "TritonFusions").load()(device) if everywhere == {"triton"} else None
    on_device = TritonOperation("sampling", "sample_rows").load() if resolve(backend) == "triton" else None
    return Kernels(
        backend=resolve(backend),
        choose_token=chooser,
        device=device,
        float8=float8,
        fused=fused,
        sample_rows=on_device,
        **chosen,
    )


def _fastest_on_cpu(wanted: set[str]) -> str:
    fastest = "reference"
    if wanted - {"reference", "triton"} and cpu.available():
        fastest = "cpu"
    if "cpu" in wanted and fastest != "cpu":
        raise IsaUnavailable("the cpu backend needs AVX2, FMA and F16C; use the reference backend")
    if "triton" in wanted and not triton_is_interpreted():
        raise ConfigError(
            "backend = 'triton' runs on the CPU in its interpreter only (TRITON_INTERPRET=1 in the "
            "environment, slow, for tests); use --device cuda, or --backend auto"
        )
    return fastest


def _resolved(name: str, operation: Operation | TritonOperation, device: torch.device) -> Operation:
    if not isinstance(operation, TritonOperation):
        return operation
    try:
        loaded = operation.load()
    except ImportError as error:
        raise ConfigError(f"backend = 'triton': {error}; install triton, or use --device cpu") from error
    return partial(loaded, device=device) if name in PACKED_FOR else loaded


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels, if they are imported now or were, run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
