"""One table says which function computes each operation on each backend; ``choose`` turns it into a Kernels.

``cpu`` is the C++ extension (csrc/), ``reference`` is literal torch. Nothing here is global state: a model
holds the Kernels it was loaded with. What each operation means is written once, in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.kernels import reference
from moe_runtime.kernels.packed import PackedExperts, PackedLinear, RouterSpec

__all__ = ["OPS", "Kernels", "PackedExperts", "PackedLinear", "RouterSpec", "choose"]

Operation = Callable[..., Any]

OPS: Mapping[str, Mapping[str, Operation]] = MappingProxyType(
    {
        name: MappingProxyType({"reference": getattr(reference, name)})
        for name in (
            "pack_linear",
            "linear",
            "pack_linear_heads",
            "linear_heads",
            "new_experts",
            "pack_expert",
            "fused_moe",
            "silu_mul",
            "route",
            "rms_norm",
            "add_rms_norm",
            "rope",
            "write_cache",
            "attention",
        )
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


def choose(backend: str = "auto", overrides: Mapping[str, str] = MappingProxyType({})) -> Kernels:
    """The functions of one backend, with single operations overridden, e.g. ``{"attention": "reference"}``.

    "auto" is "cpu" where it exists for the operation and the machine, else "reference".
    Raises ConfigError for a backend or operation that does not exist.
    """
    if backend not in ("auto", "cpu", "reference"):
        raise ConfigError(f"backend = {backend!r}, expected 'auto', 'cpu' or 'reference'")
    unknown = sorted(name for name in overrides if name not in OPS or name in PACKED_FOR)
    if unknown:
        raise ConfigError(
            f"no operation {unknown[0]!r} to override, expected one of {sorted(set(OPS) - set(PACKED_FOR))}"
        )
    chosen: dict[str, Operation] = {}
    for name, implementations in OPS.items():
        wanted = overrides.get(PACKED_FOR.get(name, name), backend)
        if wanted == "auto":
            wanted = "cpu" if "cpu" in implementations else "reference"
        if wanted not in implementations:
            raise ConfigError(
                f"operation {name!r} has no {wanted!r} backend, it has {sorted(implementations)}"
            )
        chosen[name] = implementations[wanted]
    return Kernels(backend="reference" if backend == "auto" else backend, **chosen)
