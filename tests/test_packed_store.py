"""What happens around a packed file: checkpoints replaced meanwhile, other servers, disks with their own
ideas, files of other versions of the program.
"""

import errno
import fcntl
import json
import os
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import chunked_logits
from test_packed_file import INT4, PROMPT, is_mapped, other_weights, start, touch
from world import tiny_checkpoint

from moe_runtime import loader, packed_file, packed_identity, packed_store
from moe_runtime.kernels import choose
from moe_runtime.packed_file import PREAMBLE
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", hidden_size=64)


# --- a checkpoint that is replaced meanwhile ----------------------------------------------------------------


def test_a_checkpoint_replaced_while_it_was_read_is_not_sealed_as_fresh(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = loader._pack

    def replaced(*arguments: Any) -> Any:
        loaded = pack(*arguments)
        other_weights(model)
        return loaded

    monkeypatch.setattr(loader, "_pack", replaced)
    first, store = start(model)
    assert "changed while its weights were read or packed: model.safetensors" in caplog.text
    assert "in memory only" in caplog.text and "may hold a mixture; start again" in caplog.text
    assert not store.path.exists()
    monkeypatch.undo()
    second, _ = start(model)
    third, _ = start(model)
    assert not is_mapped(second) and is_mapped(third)
    old, new, mapped = (chunked_logits(item, [PROMPT])[0] for item in (first, second, third))
    assert torch.equal(new, mapped) and not torch.equal(old, new)


def test_a_checkpoint_replaced_while_its_weights_were_written_is_not_sealed_as_fresh(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def replaced(*arguments: Any) -> int:
        size = packed_file.write(*arguments)
        touch(model)
        return size

    monkeypatch.setattr(packed_store, "write", replaced)
    _, store = start(model)
    assert "changed while its weights were read or packed: model.safetensors was of" in caplog.text
    assert list(store.path.parent.iterdir()) == []


def test_a_checkpoint_that_vanished_while_it_was_read_is_not_packed(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = loader._pack

    def removed(*arguments: Any) -> Any:
        loaded = pack(*arguments)
        (model / "model.safetensors").unlink()
        return loaded

    monkeypatch.setattr(loader, "_pack", removed)
    start(model)
    assert "in memory only" in caplog.text and "start again when the checkpoint is complete" in caplog.text


def test_another_version_of_the_conversion_makes_a_file_stale(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(model)
    monkeypatch.setattr(packed_identity, "CONVERSION_VERSION", packed_identity.CONVERSION_VERSION + 1)
    assert not is_mapped(start(model)[0])
    assert "it is stale: version of the conversion differs" in caplog.text
    assert is_mapped(start(model)[0])


def test_samples_of_a_large_file_see_its_ends_and_cost_the_same_as_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "large.safetensors", 3 << 30
    with path.open("wb") as file:  # a hole takes no room
        file.write(struct.pack("<Q", 2) + b"{}")
        file.truncate(size)
    counts = []
    pread = os.pread

    def counting(descriptor: int, count: int, offset: int) -> bytes:
        counts.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    seen = {packed_identity._weight_file(path)["samples"]}
    assert sum(counts) == 8 * (64 << 10)
    for place in (10, (64 << 10) + 9, size - (64 << 10), size - 1, 10 + (size - 10 - (64 << 10)) // 7):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([1]))
        seen.add(packed_identity._weight_file(path)["samples"])
    assert len(seen) == 6


# --- other servers, and disks -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_disk_without_locks_keeps_the_weights_in_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    def unlockable(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", unlockable)
    _, store = start(model)
    assert f"in memory only, the next start packs again: [Errno {error}]" in caplog.text
    assert list(store.path.parent.iterdir()) == []


@pytest.mark.parametrize("locked", [False, True], ids=["already", "about to"])
def test_a_file_that_another_server_took_for_a_leftover_gets_another_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    taken: list[str] = []
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if len(taken) < 3:
            [temporary] = (model / ".moe_packed").glob(".*.tmp")
            taken.append(temporary.name)
            temporary.unlink()
            if locked:
                raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    _, store = start(model)
    assert len(set(taken)) == 3
    assert list(store.path.parent.iterdir()) == [store.path] and is_mapped(start(model)[0])


def test_new_names_are_tried_only_so_often(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def taken(descriptor: int, operation: int) -> None:
        raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "flock", taken)
    _, store = start(model)
    assert "in memory only" in caplog.text and "10 temporary files were each taken for" in caplog.text
    assert list(store.path.parent.iterdir()) == []


def test_whatever_ends_the_writer_is_told_and_leaves_nothing_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(packed_store, "write", broken)
    _, store = start(model)
    assert "in memory only, the next start packs again: a bug" in caplog.text and "Traceback" in caplog.text
    assert list(store.path.parent.iterdir()) == []


def test_a_writer_that_cannot_start_leaves_nothing_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoThread:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    store = PackedStore(model, Recipe.of(INT4))
    store.open()
    loaded = loader.load_model(model, choose("cpu"), store.recipe)
    monkeypatch.setattr(threading, "Thread", NoThread)
    store.save(loaded)
    store.wait()
    assert "in memory only" in caplog.text and list(store.path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_synced_has_its_file_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    _, store = start(model)
    assert f"a power cut may lose {store.path}" in caplog.text and "in memory only" not in caplog.text
    assert is_mapped(start(model)[0])


def test_a_file_that_is_removed_once_it_is_open_serves_this_start(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = start(model)

    def removed(*arguments: Any, **settings: Any) -> packed_file.PackedFile:
        file = packed_file.open_file(*arguments, **settings)
        store.path.unlink()
        return file

    monkeypatch.setattr(packed_store, "open_file", removed)
    assert is_mapped(start(model)[0])


def test_leftovers_go_whatever_characters_the_model_has_in_its_name(tmp_path: Path) -> None:
    folder, kept = tiny_checkpoint(tmp_path / "mo[d]el*"), tmp_path / "kept"
    _, store = start(folder, folder=kept)
    store.path.unlink()
    (kept / f".{store.path.name}.1-aaaa.tmp").write_bytes(b"half")
    other = kept / ".mod-int4-g32.moe.1-aaaa.tmp"
    other.write_bytes(b"another model's")
    start(folder, folder=kept)
    assert sorted(kept.iterdir()) == sorted([store.path, other])


# --- links in the folder's place ----------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing"])
def test_a_link_in_the_place_of_the_folder_is_not_followed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    (model / ".moe_packed").symlink_to(elsewhere)
    start(model)
    assert f"the folder {model / '.moe_packed'} is a symbolic link; use --packed-dir" in caplog.text
    assert "in memory only" in caplog.text
    assert not there or list(elsewhere.iterdir()) == []
    assert there or not elsewhere.exists()


def test_a_folder_that_the_user_names_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    start(model, folder=tmp_path / "link")
    assert (
        is_mapped(start(model, folder=tmp_path / "link")[0]) and len(list((tmp_path / "disk").iterdir())) == 1
    )


def test_a_folder_exchanged_while_the_file_is_written_gets_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody can who may write to the model folder."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def exchanged(*arguments: Any) -> int:
        (model / ".moe_packed").rename(model / "checked")
        (model / ".moe_packed").symlink_to(elsewhere)
        return packed_file.write(*arguments)

    monkeypatch.setattr(packed_store, "write", exchanged)
    _, store = start(model)
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in (model / "checked").iterdir()] == [store.path.name]


# --- files of other versions of the program -----------------------------------------------------------------


def _with_table(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with another table, whole and with the right checksums."""
    data = path.read_bytes()
    magic, file_version, layout_version, start_, length, _, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    parsed = json.loads(data[start_ : start_ + length])
    change(parsed)
    table = json.dumps(parsed).encode()
    checksum = packed_file._checksum(table)
    head = PREAMBLE.pack(magic, file_version, layout_version, start_, len(table), checksum, 0)
    head = head[:-8] + struct.pack("<Q", packed_file._checksum(head[:-8]))
    path.write_bytes(head + data[PREAMBLE.size : start_] + table)


def _experts(table: dict[str, Any]) -> dict[str, Any]:
    places: Mapping[str, dict[str, Any]] = table["values"]["places"]
    return next(place for place in places.values() if place["kind"] == "PackedExperts")


def _array(table: dict[str, Any]) -> dict[str, Any]:
    return next(iter(table["arrays"].values()))  # type: ignore[no-any-return]


OTHER_TABLES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no identity": lambda table: table.pop("identity"),
    "identity is a list": lambda table: table.update(identity=[1]),
    "weight files are numbers": lambda table: table["identity"].update({"weight files": [1, 2]}),
    "weight files without a time": lambda table: table["identity"]["weight files"][0].pop("time"),
    "no arrays": lambda table: table.pop("arrays"),
    "arrays is a list": lambda table: table.update(arrays=[]),
    "an array without checksums": lambda table: _array(table).pop("checksums"),
    "an array of unknown dtype": lambda table: _array(table).update(dtype="float8"),
    "an array of no blocks": lambda table: _array(table).update(block_bytes=0),
    "an array at a word": lambda table: _array(table).update(offset="here"),
    "values is a number": lambda table: table.update(values=7),
    "no dtype": lambda table: table["values"].pop("dtype"),
    "another dtype": lambda table: table["values"].update(dtype="float8_e4m3fn"),
    "dtype is a list": lambda table: table["values"].update(dtype=["bfloat16"]),
    "no places": lambda table: table["values"].pop("places"),
    "places is a list": lambda table: table["values"].update(places=[]),
    "no weight_bytes": lambda table: table["values"].pop("weight_bytes"),
    "weight_bytes is a list": lambda table: table["values"].update(weight_bytes=[]),
    "an unknown field": lambda table: _experts(table)["fields"].update(colour="red"),
    "a field is missing": lambda table: _experts(table)["fields"].pop("hidden"),
    "an unknown format": lambda table: _experts(table)["fields"]["format"].update(kind="int3"),
    "an unknown group": lambda table: _experts(table)["fields"]["format"].update(group=7),
    "an unknown kind": lambda table: _experts(table).update(kind="PackedDreams"),
    "an unknown part": lambda table: _experts(table).update(parts=["gate_up", "sideways"]),
}


@pytest.mark.parametrize("case", OTHER_TABLES)
def test_a_table_that_this_program_does_not_know_is_refused_and_replaced(
    model: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    first, store = start(model)
    _with_table(store.path, OTHER_TABLES[case])
    caplog.clear()
    second, _ = start(model)
    assert f"{store.path} is not used: its table does not fit this program: " in caplog.text
    assert not is_mapped(second)
    assert torch.equal(chunked_logits(first, [PROMPT])[0], chunked_logits(second, [PROMPT])[0])
    assert is_mapped(start(model)[0])
