"""Kernel tests run once per instruction set of this machine; a module that must not has its own ``isa``."""

from collections.abc import Iterator

import pytest

import moe_runtime._C as _C


@pytest.fixture(autouse=True)
def _every_isa(isa: str) -> None:
    pass


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that a test changes."""
    yield
    _C.set_num_threads(0)
