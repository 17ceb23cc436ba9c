"""Whole models run on every backend: on the GPU, too, where there is one."""

from collections.abc import Iterator

import devices
import pytest

import moe_runtime._C as _C


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Triton's kernels beside those of the CPU, as the devices of this run say."""
    if "backend" not in metafunc.fixturenames:
        return
    chosen: list[object] = []
    for param in devices.parameters(metafunc):
        on_cpu = param.values[0].name == "cpu"
        chosen += (
            ["reference", *_C.supported_isas()] if on_cpu else [pytest.param("triton", marks=param.marks)]
        )
    metafunc.parametrize("backend", chosen, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference backend, the cpu backend under every instruction set, Triton's on the device."""
    if request.param in ("reference", "triton"):
        yield request.param
        return
    before = _C.isa()
    _C.select_isa(request.param)
    yield "cpu"
    _C.select_isa(before)
