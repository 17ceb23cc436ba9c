"""Digests between starts: what is remembered, what is noticed, who is not believed."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scenario_files import some_mask, write_scenario
from world import tiny_checkpoint

from moe_runtime.errors import CheckpointError
from moe_runtime.experts import file_digests
from moe_runtime.experts.file_digests import DigestMemo
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.server.scenarios import open_scenarios
from moe_runtime.server.settings import ServerConfig


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose files count as settled, though they are new."""
    monkeypatch.setattr(file_digests, "SETTLED_NS", 0)
    return tiny_checkpoint(tmp_path / "model", shards=2)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are read, from now on; the process itself remembers nothing."""
    names: list[str] = []
    plain = file_digests._read.__wrapped__

    def counted(version: file_digests.FileVersion) -> str:
        names.append(Path(version.path).name)
        return plain(version)

    monkeypatch.setattr(file_digests, "_read", counted)
    return names


def weights(read: list[str]) -> list[str]:
    """What was read since the last call, but for the tokenizer, which always is."""
    names = sorted(name for name in read if name.endswith(".safetensors"))
    read.clear()
    return names


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_next_process_reads_no_weights_and_knows_the_same(model: Path, read: list[str]) -> None:
    first = ModelIdentity.of(model, DigestMemo(model))
    assert weights(read) == SHARDS
    assert ModelIdentity.of(model, DigestMemo(model)) == first and weights(read) == []
    assert ModelIdentity.of(model) == first and weights(read) == SHARDS  # who certifies reads
    assert ModelIdentity.of(model, DigestMemo(model, verify=True)) == first and weights(read) == SHARDS
    assert ModelIdentity.of(model, DigestMemo(model)) == first and weights(read) == []
    rows = json.loads((model / ".moe_packed" / "weights.sha256.json").read_text())["files"]
    assert [(Path(row["path"]).name, row["sha256"]) for row in rows] == [
        (name, hashlib.sha256((model / name).read_bytes()).hexdigest()) for name in SHARDS
    ]


def test_a_changed_byte_under_its_old_size_and_date_is_noticed(model: Path, read: list[str]) -> None:
    first = ModelIdentity.of(model, DigestMemo(model))
    weights(read)
    shard = model / SHARDS[1]
    before, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    with shard.open("r+b") as file:
        file.write(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = shard.stat()
    same = ("st_size", "st_mtime_ns", "st_ino", "st_dev")
    assert all(getattr(after, name) == getattr(before, name) for name in same)
    assert first.difference(ModelIdentity.of(model, DigestMemo(model))) == "weights"
    assert weights(read) == SHARDS[1:]  # the other file is still known
    ModelIdentity.of(model, DigestMemo(model))
    assert weights(read) == []


def test_a_file_that_was_just_changed_is_not_remembered(
    model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_NS", 3600 * 10**9)
    with caplog.at_level(logging.INFO):
        ModelIdentity.of(model, DigestMemo(model))
    assert "2 files not, which have just been changed" in caplog.text
    weights(read)
    ModelIdentity.of(model, DigestMemo(model))
    assert weights(read) == SHARDS


def test_hashing_for_long_does_not_settle_a_new_file(
    model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest may be of a content that another one took the place of within the same tick."""
    shards = [model / name for name in SHARDS]
    for path in shards:
        os.utime(path)
    monkeypatch.setattr(file_digests, "SETTLED_NS", 3 * 10**8)
    plain = file_digests._read

    def slow(version: file_digests.FileVersion) -> str:
        time.sleep(0.4)
        return plain(version)

    monkeypatch.setattr(file_digests, "_read", slow)
    first = DigestMemo(model).digests(shards)
    assert weights(read) == SHARDS
    assert DigestMemo(model).digests(shards) == first and weights(read) == SHARDS  # settled meanwhile
    assert DigestMemo(model).digests(shards) == first and weights(read) == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = file_digests._read.__wrapped__

    def changed(version: file_digests.FileVersion) -> str:
        found = plain(version)
        os.utime(version.path, ns=(0, 0))
        return found

    monkeypatch.setattr(file_digests, "_read", changed)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        ModelIdentity.of(model)


def _belongs_to_all(path: Path) -> None:
    path.chmod(0o666)


def _is_in_a_folder_of_all(path: Path) -> None:
    path.parent.chmod(0o777)


def _is_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _lies_behind_a_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to(path.parent.with_name("moved"))


def _is_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _is_of_another_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def _says_other_things(path: Path) -> None:
    path.write_text(path.read_text().replace('"inode"', '"node"'))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_belongs_to_all, "can be written by others (mode 666)"),
        (_is_in_a_folder_of_all, "can be written by others (mode 777)"),
        (_is_a_link, "a symbolic link"),
        (_lies_behind_a_link, "is a symbolic link"),
        (_is_cut_short, "not used"),
        (_is_of_another_version, "format 2, this version reads 1"),
        (_says_other_things, "node"),
    ],
)
def test_what_others_could_have_written_or_is_broken_is_not_believed(
    model: Path, read: list[str], spoil: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    memo = DigestMemo(model)
    first = ModelIdentity.of(model, memo)
    weights(read)
    spoil(memo.path)
    assert ModelIdentity.of(model, DigestMemo(model)) == first and weights(read) == SHARDS
    assert reason in caplog.text and "is not used, the weight files are hashed again" in caplog.text


def test_another_users_file_is_not_believed(
    model: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ModelIdentity.of(model, DigestMemo(model))
    weights(read)
    if os.geteuid() == 0:
        os.chown(DigestMemo(model).path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    ModelIdentity.of(model, DigestMemo(model))
    assert weights(read) == SHARDS and "belongs to user" in caplog.text


def test_without_a_place_to_write_it_hashes_and_names_the_knob(
    model: Path, tmp_path: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (model / ".moe_packed").write_text("no folder")  # as a read-only one, which would not stop root
    for _ in range(2):
        ModelIdentity.of(model, DigestMemo(model))
        assert weights(read) == SHARDS
        assert "GB in" in caplog.text and "--packed-dir names a folder for them" in caplog.text
    elsewhere = tmp_path / "elsewhere"
    ModelIdentity.of(model, DigestMemo(model, elsewhere))
    ModelIdentity.of(model, DigestMemo(model, elsewhere))
    assert weights(read) == SHARDS and len(list(elsewhere.iterdir())) == 1


def test_a_write_that_fails_leaves_no_half_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ModelIdentity.of(model, DigestMemo(model))
    assert "No space left" in caplog.text and list((model / ".moe_packed").iterdir()) == []


def test_a_server_with_scenarios_reads_the_weights_once_in_its_life(model: Path, read: list[str]) -> None:
    write_scenario(model / "scenarios", model, "credit", some_mask(model, 4, 0))
    weights(read)
    for expected in (SHARDS, []):
        found = open_scenarios(model, ServerConfig(scenarios="credit"), DigestMemo(model))
        assert [scenario.name for scenario in found] == ["credit"]
        assert weights(read) == expected
    other = tiny_checkpoint(model.parent / "other", seed=1, shards=2)
    os.replace(other / SHARDS[0], model / SHARDS[0])  # its certificate holds no more, memo or not
    found = open_scenarios(model, ServerConfig(), DigestMemo(model))
    assert "with other weights" in found.refused["credit"] and weights(read) == SHARDS[:1]
