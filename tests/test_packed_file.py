"""Packed weights between starts: the same bits come back, and a file that is not right is said to be and
replaced.
"""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_oracle import chunked_logits
from safetensors.torch import load_file, save_file
from world import ARCHITECTURES, edit_config, tiny_checkpoint, write_weights

import moe_runtime._C as _C
from moe_runtime import packed_file, packed_folder
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.kernels import choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model
from moe_runtime.packed_file import PREAMBLE, Array, PackedFileError
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.recipe import Recipe

PROMPT = torch.arange(40, 61)
PLAIN, INT4 = EngineConfig(), EngineConfig(quantize="int4", quantize_group=32)
MIXED = EngineConfig(quantize="experts=int4,attention=int8", quantize_zeros=True)


def start(
    model_dir: Path, config: EngineConfig = INT4, folder: Path | None = None, verify: bool = True
) -> tuple[Decoder, PackedStore]:
    """As a start of the engine, until its file is complete."""
    store = PackedStore(model_dir, Recipe.of(config), folder, verify)
    model = load_model(model_dir, choose("cpu"), store.recipe, store)
    store.wait()
    return model, store


def is_mapped(model: Decoder) -> bool:
    # What the process packs itself lies on memory it may write to; torch cannot tell, the system can.
    address = model.norm.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[1].startswith("r--s")
    return False


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", hidden_size=64)


@pytest.mark.parametrize("config", [PLAIN, INT4, MIXED], ids=["plain", "int4", "mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_start_maps_the_same_model(tmp_path: Path, architecture: str, config: EngineConfig) -> None:
    folder = tiny_checkpoint(tmp_path / "model", architecture, torch_dtype="bfloat16")
    first, store = start(folder, config)
    second, _ = start(folder, config)
    assert not is_mapped(first) and is_mapped(second)
    assert second.config == first.config
    assert torch.equal(chunked_logits(first, [PROMPT])[0], chunked_logits(second, [PROMPT])[0])
    assert store.path.parent == folder / ".moe_packed"
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name], "nothing is left over"


def test_a_tied_head_and_biases_come_back(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "glm4_moe", tie_word_embeddings=True)
    logits = [chunked_logits(start(folder)[0], [PROMPT])[0] for _ in range(2)]
    assert torch.equal(*logits)


def test_each_recipe_and_folder_has_its_own_file(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    names = {start(model, config, folder=kept)[1].path for config in (PLAIN, INT4, MIXED)}
    copy = tiny_checkpoint(tmp_path / "other" / "model", hidden_size=64)
    names.add(start(copy, INT4, folder=kept)[1].path)
    assert sorted(kept.iterdir()) == sorted(names) and len(names) == 4
    assert {name.name.split("-", 2)[2] for name in names} == {
        "plain.moe", "int4-g32.moe", "experts-int4-g128z_attention-int8.moe",
    }  # fmt: skip
    assert is_mapped(start(model, MIXED, folder=kept)[0])
    assert not (model / ".moe_packed").exists()


# --- what makes a file unfit --------------------------------------------------------------------------------


def _flip(position: Callable[[bytes], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position(bytes(data))] ^= 0x10
        path.write_bytes(data)

    return damage


def _cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


def _array_byte(data: bytes) -> int:
    start, length = PREAMBLE.unpack(data[: PREAMBLE.size])[3:5]
    arrays = json.loads(data[start : start + length])["arrays"]
    return next(entry["offset"] + 77 for name, entry in arrays.items() if "experts" in name)


def _chown(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, 12345)


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    os.mkfifo(path.with_name(f".{path.name}.1-aaaa.tmp"))  # in a leftover's place too


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit of an expert": (_flip(_array_byte), r"experts.*damaged \(bytes \d+ to \d+\)"),
    "one bit of the table": (_flip(lambda data: len(data) - 9), "its table is damaged"),
    "one bit of the checksum": (_flip(lambda data: PREAMBLE.size - 1), "its first bytes are damaged"),
    "one bit of the magic": (_flip(lambda data: 0), "not a packed file"),
    "another file version": (_flip(lambda data: 8), r"version 17 with layout \d+; this program reads 1"),
    "another layout": (_flip(lambda data: 12), r"version 1 with layout \d+; this program reads 1 with"),
    "the table elsewhere": (_flip(lambda data: 17), "its first bytes are damaged"),
    "empty": (_cut(lambda size: 0), "not a packed file, or cut short"),
    "cut in its first bytes": (_cut(lambda size: 63), "not a packed file, or cut short"),
    "cut in half": (_cut(lambda size: size // 2), r"should have \d+ bytes and has \d+: cut short"),
    "cut by one byte": (_cut(lambda size: size - 1), "cut short"),
    "longer": (_cut(lambda size: size + 1), "cut short"),
    "another user's": (_chown, r"the file belongs to user 12345, not to us \(\d+\) or root"),
    "writable by others": (lambda path: path.chmod(0o646), r"can be written by others \(mode 646\)"),
    "writable by the group": (lambda path: path.chmod(0o664), r"can be written by others \(mode 664\)"),
    "a link": (_link, "it is a symbolic link; use --packed-dir for another place"),
    "a folder": (_folder, "not a regular file"),
    "a pipe": (_pipe, "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_an_unfit_file_is_refused_and_replaced(
    model: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    damage, message = DAMAGE[case]
    first, store = start(model)
    damage(store.path)
    caplog.clear()
    second, _ = start(model)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][:1]
    assert str(store.path) in warning and "Packing the weights anew" in warning
    assert re.search(message, warning), warning
    assert not is_mapped(second)
    assert torch.equal(chunked_logits(first, [PROMPT])[0], chunked_logits(second, [PROMPT])[0])
    if case != "a folder":  # that cannot be replaced: weights stay in memory
        assert is_mapped(start(model)[0])


def touch(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def other_weights(folder: Path) -> None:
    """Of the same shapes and file size."""
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {name: tensor * 1.5 for name, tensor in tensors.items()})


def _at_the_same_time(folder: Path) -> None:
    before = (folder / "model.safetensors").stat()
    other_weights(folder)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == before.st_size


def _longer_header(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "x" * 64})


def _shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, shards=2)


MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{9} UTC"
STALE: dict[str, tuple[Callable[[Path], object], str]] = {
    "touched": (touch, rf"model.safetensors was of {MOMENT}, now of {MOMENT}"),
    "other weights": (other_weights, rf"model.safetensors (was of {MOMENT}, now of|has other contents)"),
    "other weights of the same time": (
        _at_the_same_time, "model.safetensors has other contents, of the same size and time",
    ),
    "a longer header": (_longer_header, r"model.safetensors had \d+ bytes, now \d+"),
    "in shards": (_shards, "model-00001-of-00002.safetensors is new"),
    "another config": (lambda folder: edit_config(folder, rms_norm_eps=1e-5), "config.json differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", STALE)
def test_a_file_of_other_weights_is_stale(model: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    change, message = STALE[case]
    start(model)
    change(model)
    second, _ = start(model)
    assert re.search(rf"it is stale: {message}.*\. Packing", caplog.text) and not is_mapped(second)
    third, _ = start(model)
    assert is_mapped(third)
    assert torch.equal(chunked_logits(second, [PROMPT])[0], chunked_logits(third, [PROMPT])[0])


def test_a_flipped_bit_is_found_in_every_byte_of_a_small_file(tmp_path: Path) -> None:
    arrays = {
        "a": Array(torch.arange(150, dtype=torch.uint8), 64),
        "b": Array(torch.linspace(0, 1, 37)),
        "c": Array(torch.empty(0, 5)),
    }
    path = tmp_path / "small"
    with path.open("wb") as file:
        packed_file.write(file.fileno(), arrays, {"made": "here"}, {"x": [1, "y"]})
    good = path.read_bytes()
    opened = packed_file.open_file(path, lambda identity: None, verify=True)
    assert opened.values == {"x": [1, "y"]}
    assert all(torch.equal(opened.arrays[name], array.tensor) for name, array in arrays.items())
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        try:
            packed_file.open_file(path, lambda identity: None, verify=True)
        except PackedFileError:
            continue
        assert PREAMBLE.size + 150 <= position < 256 or 256 + 148 <= position < 448, "between the arrays"


def test_without_verify_the_table_alone_is_checked(model: Path) -> None:
    _, store = start(model)
    _flip(_array_byte)(store.path)
    assert is_mapped(start(model, verify=False)[0])
    _flip(lambda data: len(data) - 9)(store.path)
    assert not is_mapped(start(model, verify=False)[0])


# --- places -------------------------------------------------------------------------------------------------


def test_without_a_place_to_write_the_weights_stay_in_memory(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        loaded, _ = start(model, folder=tmp_path / "file" / "below")
        assert not is_mapped(loaded)
    assert "in memory only, the next start packs again: " in caplog.text and "--packed-dir" in caplog.text


def test_a_folder_that_others_can_write_is_not_used(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert not is_mapped(start(model, folder=shared)[0])
    assert "can be written by others (mode 777)" in caplog.text and not list(shared.iterdir())
    shared.chmod(0o755)
    start(model, folder=shared)
    shared.chmod(0o777)
    assert not is_mapped(start(model, folder=shared)[0])


def test_a_full_disk_is_told_before_and_while_writing(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_folder, "SPARE_BYTES", 1 << 60)
    start(model)
    assert "GB free, 1152921504.6 GB are needed" in caplog.text
    monkeypatch.undo()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file.os, "pwrite", full)
    _, store = start(model)
    assert "in memory only, the next start packs again: [Errno 28] No space" in caplog.text
    assert not list(store.path.parent.iterdir())
    monkeypatch.undo()
    start(model)
    assert is_mapped(start(model)[0])


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(model: Path) -> None:
    _, store = start(model)
    store.path.unlink()
    dead = store.path.with_name(f".{store.path.name}.1-aaaa.tmp")
    dead.write_bytes(b"half")
    living = store.path.with_name(f".{store.path.name}.2-bbbb.tmp")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print(flush=True); sys.stdin.read()", str(living)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        start(model)
        assert sorted(store.path.parent.iterdir()) == sorted([store.path, living])
    start(model)


def test_two_starts_at_once_leave_one_good_file(model: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom test_packed_file import start, is_mapped\n"
        "for _ in range(3):\n    start(Path(sys.argv[1]))[1].path.unlink(missing_ok=True)\n"
        "start(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(model), str(Path(__file__).parent)]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    loaded, store = start(model)
    assert is_mapped(loaded) and list(store.path.parent.iterdir()) == [store.path]


def test_the_engine_keeps_packed_weights_unless_told_not_to(model: Path, tmp_path: Path) -> None:
    def load(**settings: object) -> Engine:
        engine = Engine.load(model, EngineConfig(quantize="int8", **settings))  # type: ignore[arg-type]
        for thread in threading.enumerate():
            if thread.name == "moe-packed-writer":
                thread.join()
        return engine

    load(packed_file=False)
    load(backend="reference")
    assert not (model / ".moe_packed").exists()
    load(packed_dir=tmp_path / "kept")
    [path] = (tmp_path / "kept").iterdir()
    assert path.name.endswith("-int8.moe") and path.stat().st_mode & 0o777 == 0o644 & ~_umask()
    assert is_mapped(load(packed_dir=tmp_path / "kept").model)
    load()
    assert (model / ".moe_packed" / "int8.moe").exists()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checksums_see_every_flipped_bit_and_every_length() -> None:
    data = torch.randint(0, 256, (700,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {_C.checksum(data.data_ptr(), length) for length in range(701)}
    assert len(seen) == 701
    for position in range(700):
        data[position] ^= 1 << position % 8
        seen.add(_C.checksum(data.data_ptr(), 700))
        data[position] ^= 1 << position % 8
    assert len(seen) == 1401


@pytest.mark.parametrize("size", [0, 1, 64, 65, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 1_000_003])
def test_a_file_has_the_checksum_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = torch.randint(0, 256, (size + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (tmp_path / "data").write_bytes(data.numpy().tobytes())
    with (tmp_path / "data").open("rb") as file:
        assert _C.checksum_file(file.fileno(), 5, size) == _C.checksum(data.data_ptr() + 5, size)
        with pytest.raises(Exception, match="the file ends at byte"):
            _C.checksum_file(file.fileno(), 5, size + 1)
