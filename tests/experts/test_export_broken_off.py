"""An export is complete or not there: disk full, killed, two at once; and how much memory it takes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exporting import case_checkpoint, check_bytes, exported
from model_oracle import load
from world import tiny_checkpoint

from moe_runtime.errors import MoeRuntimeError, PlanError
from moe_runtime.experts import weight_writer, whole_folder
from moe_runtime.experts.export import GHOST_ROUTER, MANIFEST
from moe_runtime.loader import require_model_folder


def test_nothing_is_written_over_and_two_writers_do_not_mix(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "mine").write_text("old")
    with pytest.raises(PlanError, match="cut exists already"):
        exported(folder, mask, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["mine"]
    with pytest.raises(PlanError, match="there is no folder nowhere"):
        exported(folder, mask, tmp_path / "nowhere" / "cut")
    with (
        whole_folder.new_folder(tmp_path / "new", 0) as partial,
        pytest.raises(PlanError, match="another process is writing new"),
    ):
        (partial / "begun").write_text("first")
        exported(folder, mask, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["begun"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("moe_runtime.experts.whole_folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(PlanError, match=r"0\.00 GB free"):
        exported(folder, mask, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("full_at", [SHARD, INDEX, "tokenizer.json", GHOST_ROUTER, MANIFEST, "config.json"])
def test_a_disk_that_fills_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe", shards=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fills(write: Any) -> Any:
        def write_or_fail(file: Any, chunk: bytes) -> None:
            if Path(full_at).name in str(file.name):
                write(file, chunk[: len(chunk) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, chunk)

        return write_or_fail

    def sync(descriptor: int) -> None:  # a file that only the disk's last word shows to be too large
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if full_at == MANIFEST and MANIFEST in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_writer, "write_all", fills(weight_writer.write_all))
    monkeypatch.setattr("moe_runtime.experts.whole_file.os.fsync", sync)
    with pytest.raises(PlanError, match="cannot be written to .*: No space left on device"):
        exported(folder, mask, tmp_path / "cut", ghost_router=True)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


STALLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from exporting import exported, mask_of
from moe_runtime.experts import weight_writer

write = weight_writer.write_all
def stalls(file, chunk):
    if Path(file.name).name == sys.argv[4]:
        write(file, chunk[: len(chunk) // 2])
        print("stalled", flush=True)
        sys.stdin.read()
    write(file, chunk)
weight_writer.write_all = stalls
exported(Path(sys.argv[2]), mask_of(Path(sys.argv[2]), (1, 3, 4, 7)), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("killed_at", [SHARD, "config.json"])  # the last file
def test_a_killed_export_leaves_nothing_that_loads_and_the_next_one_succeeds(
    tmp_path: Path, killed_at: str
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe", shards=2)
    tests = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", STALLED, tests, str(folder), str(tmp_path / "cut"), killed_at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "stalled\n"
        with pytest.raises(PlanError, match="another process is writing cut"):
            exported(folder, mask, tmp_path / "cut")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert [path.name for path in left] == [".cut.partial"]
    with pytest.raises(MoeRuntimeError):
        require_model_folder(left[0])
        load(left[0], "cpu")
    exported(folder, mask, tmp_path / "cut")
    check_bytes(folder, mask, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "full"]


MEASURE = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from exporting import exported, mask_of

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base = Path(sys.argv[2])
small, big = (mask_of(base / name, (1, 3, 4, 7)) for name in ("small", "big"))
exported(base / "small", small, base / "small-cut")     # whatever is allocated once, is now
Path("/proc/self/clear_refs").write_text("5")           # peak = present
before = kilobytes("VmRSS")
exported(base / "big", big, base / "big-cut")
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_far_below_one_shard(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "small")
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024}
    folder = tiny_checkpoint(tmp_path / "big", shards=4, **sizes)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent.parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    print(f"{size / 1e6:.0f} MB in 4 shards, peak {int(output) / 1e6:.1f} MB")
    assert size >= 200_000_000
    assert int(output) <= size / 4 / 2
