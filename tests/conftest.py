"""Instruction sets: what runs on the C++ kernels runs under each that this machine has."""

from collections.abc import Iterator

import pytest

import moe_runtime._C as _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after the other, as MOE_FORCE_ISA would choose it."""
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture(params=["reference", *_C.supported_isas()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference backend, then the cpu backend under every instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    before = _C.isa()
    _C.select_isa(request.param)
    yield "cpu"
    _C.select_isa(before)
