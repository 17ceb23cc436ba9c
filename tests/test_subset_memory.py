"""What was left out of a model is not in memory, and is not read from the disk."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from world import tiny_checkpoint

# 200 MB of experts in bfloat16; attention and head are small beside them.
BIG = {
    "hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "head_dim": 32, "torch_dtype": "bfloat16", "eos_token_id": None,
}  # fmt: skip
KEPT = tuple(range(1, 32, 4))  # a quarter of them, none beside another

LOAD = """
import re, sys
from pathlib import Path
from moe_runtime.config import EngineConfig
from moe_runtime.expert_room import ExpertRoom
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model
from moe_runtime.packed_store import PackedStore
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.quant.quality import log_probabilities
from moe_runtime.quant.recipe import Recipe

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def start(folder, kept=None, packed=False):
    mask = kept and ExpertMask(tuple(LayerMask(layer, 32, kept) for layer in range(2)))
    store = PackedStore(folder, Recipe(), None, True, mask) if packed else None
    room = mask and ExpertRoom(EngineConfig(), Placement.of(mask))
    model = load_model(folder, choose("cpu"), store=store, room=room)
    if store:
        store.wait()
    return model

small, big, kept = Path(sys.argv[1]), Path(sys.argv[2]), tuple(map(int, sys.argv[3].split(",")))
"""
MEASURE = """
kept_models = [start(small)]  # whatever is allocated once, is now
sizes = [kilobytes("VmRSS")]
for experts in (kept, None):
    kept_models.append(start(big, experts))
    sizes.append(kilobytes("VmRSS"))
start(big, kept, packed=True)
size = next((big / ".moe_packed").glob("*.moe")).stat().st_size
before = kilobytes("RssFile")
mapped = start(big, kept, packed=True)
loaded = kilobytes("RssFile")
log_probabilities(mapped, [list(range(row, row + 60)) for row in range(0, 200, 40)])
used = kilobytes("RssFile")
print(sizes[1] - sizes[0], sizes[2] - sizes[1], *(model.config.weight_bytes for model in kept_models[1:]))
print((loaded - before) * 1024 / size, (used - before) * 1024 / size)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model and a big one."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "small", torch_dtype="bfloat16"), tiny_checkpoint(folder / "big", **BIG)


def run(program: str, folders: tuple[Path, Path]) -> str:
    return subprocess.run(
        [sys.executable, "-c", LOAD + program, *folders, ",".join(map(str, KEPT))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_proportional_to_the_experts_that_are_kept(folders: tuple[Path, Path]) -> None:
    part, whole, part_bytes, whole_bytes, loaded, used = map(float, run(MEASURE, folders).split())
    share = part_bytes / whole_bytes
    print(f"{share:.4f} of the weights take {part / whole:.4f} of the memory ({part / 1e3:.1f} MB)")
    print(f"mapped: {loaded:.3f} of the packed file at start, {used:.3f} when all its experts were used")
    assert whole_bytes >= 200e6 and share < 0.26
    assert abs(part / whole - share) <= 0.05 * share
    assert loaded <= 0.03 and used <= 1.05


def cached_share(path: Path) -> float:
    """The part of a file that lies in the system's cache, 0 to 1."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(place))
        failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages)
        del place
    if failed:
        pytest.skip("the system does not tell what it has cached")
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for its cached pages")
def test_only_the_kept_experts_are_read(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "model.safetensors"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) > 0.01:
        pytest.skip("the file system keeps files in memory")
    share = float(run("print(start(big, kept).config.weight_bytes)", folders)) / path.stat().st_size
    read = cached_share(path)
    print(f"{read:.4f} of the file was read for {share:.4f} of its weights")
    # Reading its header fetches a few megabytes more.
    assert share <= read <= share + 0.05
