"""One table says which function computes each operation on each backend; ``choose`` turns it into a Kernels.

``cpu`` is the C++ extension (csrc/), ``reference`` is literal torch. Nothing here is global state: a model
holds the Kernels it was loaded with. What each operation means is written once, in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_runtime.errors import ConfigError, IsaUnavailable
from moe_runtime.kernels import cpu, packing, reference, sampler
from moe_runtime.kernels.cpu import set_num_threads
from moe_runtime.kernels.packed import (
    PackedExperts,
    PackedLinear,
    QuantizedWeight,
    RouterSpec,
    Weight,
    WeightFormat,
)

__all__ = [
    "OPS",
    "Kernels",
    "PackedExperts",
    "PackedLinear",
    "QuantizedWeight",
    "RouterSpec",
    "Weight",
    "WeightFormat",
    "choose",
    "set_num_threads",
]

Operation = Callable[..., Any]


def _row(cpu_function: Operation, reference_function: Operation) -> Mapping[str, Operation]:
    return MappingProxyType({"cpu": cpu_function, "reference": reference_function})


OPS: Mapping[str, Mapping[str, Operation]] = MappingProxyType(
    {
        "pack_linear": _row(packing.pack_linear, reference.pack_linear),
        "pack_linear_heads": _row(packing.pack_linear_heads, reference.pack_linear_heads),
        "new_experts": _row(packing.new_experts, reference.new_experts),
        "pack_expert": _row(packing.pack_expert, reference.pack_expert),
        "linear": _row(cpu.linear, reference.linear),
        "linear_heads": _row(cpu.linear_heads, reference.linear_heads),
        "fused_moe": _row(cpu.fused_moe, reference.fused_moe),
        "silu_mul": _row(cpu.silu_mul, reference.silu_mul),
        "route": _row(cpu.route, reference.route),
        "rms_norm": _row(cpu.rms_norm, reference.rms_norm),
        "add_rms_norm": _row(cpu.add_rms_norm, reference.add_rms_norm),
        "rope": _row(cpu.rope, reference.rope),
        "write_cache": _row(cpu.write_cache, reference.write_cache),
        "attention": _row(cpu.attention, reference.attention),
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


@dataclass(frozen=True)
class Kernels:
    """The chosen function for each operation; signatures and meanings are those of reference.py."""

    backend: str
    pack_linear: Operation
    linear: Operation
    pack_linear_heads: Operation
    linear_heads: Operation
    new_experts: Operation
    pack_expert: Operation
    fused_moe: Operation
    silu_mul: Operation
    route: Operation
    rms_norm: Operation
    add_rms_norm: Operation
    rope: Operation
    write_cache: Operation
    attention: Operation
    choose_token: Operation | None  # the draw of a token, where there is a faster one than sampling.py's

    def all_from(self, backend: str) -> bool:
        """Whether every operation is this backend's, none overridden."""
        return all(getattr(self, name) is row[backend] for name, row in OPS.items())


def choose(backend: str = "auto", overrides: Mapping[str, str] = MappingProxyType({})) -> Kernels:
    """The functions of one backend, with single operations overridden, e.g. ``{"attention": "reference"}``.

    "auto" is "cpu" on a machine with AVX2, else "reference". Packing follows the operation that reads it.
    Raises ConfigError for a backend or operation that does not exist, IsaUnavailable for "cpu" on a machine
    without AVX2 or a MOE_FORCE_ISA that it cannot run.
    """
    wanted = {backend, *overrides.values()}
    if unknown := sorted(wanted - {"auto", "cpu", "reference"}):
        raise ConfigError(f"backend = {unknown[0]!r}, expected 'auto', 'cpu' or 'reference'")
    if unknown := sorted(name for name in overrides if name not in OPS or name in PACKED_FOR):
        choices = sorted(set(OPS) - set(PACKED_FOR))
        raise ConfigError(f"no operation {unknown[0]!r} to override, expected one of {choices}")
    fastest = "reference"
    if wanted != {"reference"} and cpu.available():
        fastest = "cpu"
    if "cpu" in wanted and fastest != "cpu":
        raise IsaUnavailable("the cpu backend needs AVX2, FMA and F16C; use the reference backend")

    def resolve(name: str) -> str:
        return fastest if name == "auto" else name

    chosen = {
        name: implementations[resolve(overrides.get(PACKED_FOR.get(name, name), backend))]
        for name, implementations in OPS.items()
    }
    chooser = sampler.choose_token if resolve(backend) == "cpu" else None
    return Kernels(backend=resolve(backend), choose_token=chooser, **chosen)
