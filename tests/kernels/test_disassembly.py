"""What the compiler really made: an object holds only instructions its machines have, and hides its symbols.

An instruction that slipped into the wrong object is a crash on somebody's older machine, and so is an inline
function compiled for AVX-512 that the linker keeps for everybody. The objects are those of the build folder,
where an editable install (``make``) leaves them.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import moe_runtime._C as _C

ROOT = Path(__file__).parents[2]
VEX = re.compile(r"^v[a-z]")  # every AVX mnemonic, and no other of x86-64, begins so
AVX512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
BFLOAT16 = re.compile(r"^(vdpbf16ps|vcvtne\w*bf16)")
TILES = re.compile(r"%tmm|^(tile|tdp|ldtilecfg|sttilecfg)")

# Kernel object -> what must be found in it (it is what we think it is), and what must not.
KERNELS = {
    "kernels_avx2": ([re.compile("%ymm")], [AVX512, BFLOAT16, TILES]),
    "kernels_avx512": ([re.compile("%zmm"), re.compile(r"%k[1-7]\b")], [BFLOAT16, TILES]),
    "kernels_avx512bf16": ([re.compile("%zmm"), BFLOAT16], [TILES]),
    "kernels_amx": ([re.compile("%zmm"), TILES], []),
}
SOURCES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cpp"))

pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None or shutil.which("nm") is None, reason="needs binutils: objdump and nm"
)


@pytest.fixture
def isa() -> None:
    """Once is enough: nothing here runs a kernel."""


def object_file(stem: str) -> Path:
    found = ROOT.glob(f"build/*/CMakeFiles/_C.dir/{stem}.cpp.o")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    assert newest, f"no object of csrc/{stem}.cpp under build/: install with pip install -e . or make"
    return newest


@functools.cache
def instructions(stem: str) -> list[str]:
    """Mnemonic and operands of every instruction, prefixes such as ``lock`` left out."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", object_file(stem)], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split("\t", 1)[1] for line in text.splitlines() if re.match(r"^\s+[0-9a-f]+:\t", line)]
    assert lines
    return [re.sub(r"^((lock|rep[nez]*|notrack|data16|bnd) )+", "", line) for line in lines]


def test_every_kernel_source_has_its_rules() -> None:
    assert {stem for stem in SOURCES if stem.startswith("kernels_")} <= set(KERNELS)


@pytest.mark.parametrize("stem", [stem for stem in SOURCES if stem in KERNELS])
def test_a_kernel_object_holds_only_what_its_machines_have(stem: str) -> None:
    wanted, forbidden = KERNELS[stem]
    lines = instructions(stem)
    for pattern in wanted:
        assert any(pattern.search(line) for line in lines), f"{stem}: nothing matches {pattern.pattern}"
    for pattern in forbidden:
        assert not [line for line in lines if pattern.search(line)][:3], f"{stem} has {pattern.pattern}"


@pytest.mark.parametrize("stem", [stem for stem in SOURCES if stem not in KERNELS])
def test_everything_else_runs_on_any_x86_64(stem: str) -> None:
    assert not [line for line in instructions(stem) if VEX.search(line) or TILES.search(line)][:3]


@pytest.mark.parametrize("stem", [stem for stem in SOURCES if stem in KERNELS])
def test_a_kernel_object_exports_its_table_and_nothing_the_linker_could_share(stem: str) -> None:
    text = subprocess.run(
        ["nm", "--defined-only", object_file(stem)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in text.splitlines()]
    # Lower case is local; W, V and u would be inline functions or variables, merged across objects.
    assert [name for kind, name in symbols if not kind.islower() or kind in "uvw"] == [f"moe_{stem}"]


def test_the_extension_shows_the_process_its_entry_only() -> None:
    text = subprocess.run(
        ["nm", "--dynamic", "--defined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in text.splitlines()] == ["PyInit__C"]
