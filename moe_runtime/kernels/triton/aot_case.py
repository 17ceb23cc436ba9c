"""One ahead-of-time compilation of one kernel: what the compiler has to be told when no tensor is at hand.

Each kernel file lists its cases, with the shapes that models in production have, as ``AOT_CASES``; a tool
compiles them for every target without a GPU. Knows no kernel and no target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """``signature`` names every argument in order: "*fp32" a pointer, "i32" or "i64" an integer, "fp32" a
    float, "constexpr" a value that ``constexprs`` gives. ``aligned`` names the pointers and sizes that are
    multiples of 16, as a launch would find out by itself: without it the compiler may not widen its loads.
    ``hip_warps``: on AMD, where it is not ``num_warps``. ``max_registers``: per thread, what NVIDIA's
    assembler is told to keep to.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    hip_warps: int | None = None
    max_registers: int | None = None
