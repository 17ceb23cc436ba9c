"""Instruction sets and devices: what runs on the C++ kernels runs under each set that this machine has, and
the engine's tests run on the CPU and on a GPU (devices.py).
"""

from collections.abc import Iterator

import devices
import pytest

import moe_runtime._C as _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        action="append",
        choices=devices.NAMES,
        help="where the engine's tests compute; may be repeated (default: cpu and, if there is a GPU, cuda)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "interpreter" in devices.of(config) and not devices.refusal("interpreter"):
        devices.interpret()
        # numpy, which it computes with, warns of NaN, overflow and division by zero
        config.addinivalue_line("filterwarnings", r"ignore::RuntimeWarning:.*\binterpreter")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the engine once per device."""
    if "compute_device" in metafunc.fixturenames:
        chosen = devices.parameters(metafunc)
        metafunc.parametrize("compute_device", chosen, indirect=True, scope="module", ids=str)


@pytest.fixture(scope="module")
def compute_device(request: pytest.FixtureRequest) -> Iterator[devices.ComputeDevice]:
    """The device that engines loaded meanwhile are loaded for."""
    device: devices.ComputeDevice = request.param
    before = _C.isa()
    if device.isa:
        _C.select_isa(device.isa)
    with device.entered():
        yield device
    _C.select_isa(before)


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
