"""Each AMX wrapper of csrc/amx_tiles.h against a literal model of its instruction.

On a machine with AMX these test the wrappers and the model, elsewhere (test_amx.py starts them) the emulator.
"""

import ctypes
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.amx_machine import HERE, compile_library

import moe_runtime._C as _C

pytestmark = pytest.mark.skipif(
    "amx" not in _C.supported_isas(), reason="no AMX here: test_amx.py runs this file under its emulator"
)
CSRC = str(HERE.parents[1] / "csrc")
TINY = 2.0**-126


@pytest.fixture
def isa() -> None:
    """Once is enough: nothing here goes through the table of kernels."""


@pytest.fixture(scope="module", params=["-O2", "-O3"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("amx") / f"probe{request.param}.so"
    return compile_library("c++", "amx_probe.cpp", target, "-std=c++17", request.param, f"-I{CSRC}")


def config(*shapes: tuple[int, int]) -> bytes:
    """LDTILECFG's operand for tiles of (rows, bytes per row)."""
    rows, columns = [s[0] for s in shapes], [s[1] for s in shapes]
    return struct.pack(
        "<2B14x16H16B", 1, 0, *columns, *[0] * (16 - len(shapes)), *rows, *[0] * (16 - len(shapes))
    )


def normal(x: torch.Tensor) -> torch.Tensor:
    """Subnormals are zero, on the way in and out."""
    return torch.where(x.abs() < TINY, torch.zeros_like(x), x)


def multiply_add(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """float32 fma of bf16 x and y: the product is exact, and rounding the float64 sum again does no harm."""
    return normal((normal(x).double() * normal(y).double() + z.double()).float())


def model_dot(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """c [M, N] + a [M, K, 2] * b [K, N, 2]: even products in one chain, odd in another, then their sum."""
    chains = [torch.zeros_like(c), torch.zeros_like(c)]
    for k in range(a.shape[1]):
        for half in (0, 1):
            x, y = a[:, k, half].float().unsqueeze(1), b[k, :, half].float()
            chains[half] = multiply_add(x.expand_as(c), y.expand_as(c), chains[half])
    return normal(normal(c) + normal(chains[0] + chains[1]))


def values(kind: str, *shape: int) -> torch.Tensor:
    if kind == "normal":
        return torch.randn(*shape)
    if kind == "cancelling":  # every addition rounds: the order shows
        return torch.randn(*shape) * 10.0 ** torch.randint(-8, 9, shape)
    few = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-39, TINY, 3e38, 1e-20]
    if kind == "strange":
        few += [float("inf"), float("-inf"), float("nan")]
    return torch.tensor(few)[torch.randint(0, len(few), shape)]


@pytest.mark.parametrize("kind", ["normal", "cancelling", "small", "strange"])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 16), (1, 16, 16), (5, 3, 7), (16, 1, 1), (3, 16, 2)])
def test_a_product_of_tiles_is_two_chains_and_their_sum(
    library: Path, kind: str, m: int, n: int, k: int
) -> None:
    torch.manual_seed(m * n + k)
    probe = ctypes.CDLL(str(library)).probe_dot
    a, b = values(kind, m, k, 2).bfloat16(), values(kind, k, n, 2).bfloat16()
    c = torch.full((m + 1, n + 3), 77.0)  # a stride of its own, and a frame that must stay as it is
    c[:m, :n] = values(kind, m, n)
    wanted = c.clone()
    wanted[:m, :n] = model_dot(c[:m, :n], a, b)
    pointers = [(c, (n + 3) * 4), (a, k * 4), (b, n * 4)]
    arguments = [
        item for x, stride in pointers for item in (ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(stride))
    ]
    probe(config((m, n * 4), (m, k * 4), (k, n * 4)), *arguments)
    assert torch.equal(c.isnan(), wanted.isnan())
    same = ~wanted.isnan()
    assert torch.equal(c[same].view(torch.int32), wanted[same].view(torch.int32))


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (1, 4), (7, 20), (16, 1), (3, 64)])
def test_a_tile_moves_its_bytes_and_no_others(library: Path, rows: int, columns: int) -> None:
    probe = ctypes.CDLL(str(library)).probe_copy
    source = torch.randint(1, 256, (16, 70), dtype=torch.uint8)
    to, zeroed = torch.full((17, 80), 9, dtype=torch.uint8), torch.full((17, 80), 9, dtype=torch.uint8)
    address = [ctypes.c_void_p(x.data_ptr()) for x in (source, to, zeroed)]
    shapes = [(16, 64)] * 7 + [(rows, columns)]
    probe(config(*shapes), address[0], ctypes.c_int64(70), address[1], address[2], ctypes.c_int64(80))
    for target, inside in ((to, source[:rows, :columns]), (zeroed, torch.zeros(rows, columns))):
        assert torch.equal(target[:rows, :columns], inside.to(torch.uint8))
        target[:rows, :columns] = 9
        assert torch.all(target == 9)


def test_the_compiler_keeps_the_order_of_stores_and_tile_loads(library: Path) -> None:
    probe = ctypes.CDLL(str(library)).probe_widen
    codes = torch.randint(0, 256, (50, 512), dtype=torch.uint8)
    out = torch.zeros(50, 2, 512, dtype=torch.int16)
    probe(ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(50), ctypes.c_void_p(out.data_ptr()))
    first = (codes.int() * 257 + 1) & 0xFFFF
    assert torch.equal(out.int() & 0xFFFF, torch.stack((first, 0xFFFF - first), dim=1))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, "before LDTILECFG"),
        (1, "that the configuration does not have"),
        (2, "shapes of the tiles do not fit"),
        (3, "unknown palette"),
        (4, "too large"),
        (5, "reserved byte"),
        (6, "not one of those emulated"),
    ],
)
def test_misused_tiles_end_the_process(library: Path, how: int, message: str) -> None:
    """With the emulator's message, or by the signal of a real processor."""
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).probe_misuse(ctypes.c_int64({how}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode < 0 or (result.returncode == 133 and message in result.stderr)
