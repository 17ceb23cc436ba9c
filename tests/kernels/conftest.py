"""Every kernel test runs once per instruction set of this machine."""

from collections.abc import Iterator

import pytest

import moe_runtime._C as _C


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that a test changes."""
    yield
    _C.set_num_threads(0)
