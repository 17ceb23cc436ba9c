"""Compiles the AMX emulator and the probe of csrc/amx_tiles.h for the tests; skips where that cannot be."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import moe_runtime._C as _C

HERE = Path(__file__).parent


def compile_library(compiler: str, source: str, target: Path, *flags: str) -> Path:
    """A shared object of ``source``, a file beside this one, at ``target``."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a compiler: {compiler}")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags, "-o", str(target), source]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def amx_environment(folder: Path) -> dict[str, str]:
    """The environment of a process that uses the AMX kernels, emulated where the machine has no AMX."""
    environment = {**os.environ, "MOE_FORCE_ISA": "amx"}
    if "amx" in _C.supported_isas():
        return environment
    if "avx512bf16" not in _C.supported_isas():
        pytest.skip("the AMX kernels use AVX-512 BF16 around the tiles, which this machine lacks")
    emulator = compile_library("cc", "amx_emulator.c", folder / "amx_emulator.so", "-O2")
    return {**environment, "LD_PRELOAD": str(emulator)}
