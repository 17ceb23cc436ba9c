"""Triton kernels are tested on the GPU when there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 at the moment a kernel is defined, triton's own library
functions included: the variable must be set before anything imports triton, which transformers' model files
do too. A run of all tests reads this file before it comes to them; one in another order, without the variable
in its environment, fails here and says so. Ahead-of-time compilation needs the opposite and therefore runs in
processes of its own (test_aot.py).
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()  # also true of an AMD GPU
if not GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = False
if HAS_TRITON and not GPU:
    from triton.language.standard import cdiv  # one of its own functions shows which way it was imported
    from triton.runtime import JITFunction

    INTERPRETED = not isinstance(cdiv, JITFunction)
if INTERPRETED:
    from kernels.triton.interpreter import repair

    repair()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if not GPU and not INTERPRETED:
        pytest.fail("no GPU, and something imported triton before TRITON_INTERPRET=1 was set")
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def _no_arithmetic_warnings() -> Iterator[None]:
    """numpy, which the interpreter computes with, warns of NaN, overflow and division by zero."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r".*\binterpreter")
        yield


@pytest.fixture
def isa() -> str:
    """These tests do not run on the C++ kernels: once is enough."""
    return "triton"
