"""Hostile and damaged safetensors files: each is refused with a message naming the file (T31, T32)."""

import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file
from world import tiny_checkpoint

from moe_runtime.checkpoint import Checkpoint
from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.recipe import Recipe

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}
DATA = bytes(32)


def blob(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = blob({"a": A, "b": B})

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "header of 2^63": blob({"a": A, "b": B}, length=1 << 63),
    "header of 2^64 - 1": blob({"a": A, "b": B}, length=(1 << 64) - 1),
    "header longer than the file": blob({"a": A, "b": B}, length=10_000),
    "header of 101 MB": blob({"a": A, "b": B}, length=101_000_000),
    "not utf-8": blob(b'{"a\xff": 1}'),
    "not json": blob(b"{]"),
    "json list": blob([]),
    "nested 200,000 deep": blob(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "NaN in the header": blob(b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,NaN]}}'),
    "overlap": blob({"a": A, "b": {**B, "data_offsets": [8, 24]}}, bytes(24)),
    "hole": blob({"a": A, "b": {**B, "data_offsets": [20, 36]}}, bytes(36)),
    "trailing bytes": GOOD + b"PK\x03\x04",
    "truncated": GOOD[:-1],
    "cut in half": GOOD[: len(GOOD) // 2],
    "shape overflow": blob({"a": {**A, "shape": [1 << 62, 1 << 62]}, "b": B}),
    "shape wraps to the right size": blob({"a": {**A, "shape": [(1 << 62) + 1, 4]}, "b": B}),
    "negative shape": blob({"a": {**A, "shape": [-2, -2]}, "b": B}),
    "boolean shape": blob({"a": {**A, "shape": [4, True]}, "b": B}),
    "fractional shape": blob({"a": {**A, "shape": [2.0, 2]}, "b": B}),
    "reversed offsets": blob({"a": {**A, "data_offsets": [16, 0]}, "b": B}),
    "negative offset": blob({"a": {**A, "data_offsets": [-16, 0]}, "b": B}),
    "offsets too short for the shape": blob({"a": {**A, "shape": [8, 8]}, "b": B}),
    "unknown dtype": blob({"a": {**A, "dtype": "F33"}, "b": B}),
    "dtype is a list": blob({"a": {**A, "dtype": ["F32"]}, "b": B}),
    "missing field": blob({"a": {"dtype": "F32", "shape": [2, 2]}, "b": B}),
    "extra field": blob({"a": {**A, "script": "x"}, "b": B}),
    "duplicate key": blob(
        b'{"a":'
        + json.dumps(A).encode()
        + b',"b":'
        + json.dumps(B).encode()
        + b',"a":'
        + json.dumps(A).encode()
        + b"}"
    ),
    "duplicate key with another dtype": blob(
        b'{"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},"a":'
        + json.dumps(A).encode()
        + b',"b":'
        + json.dumps(B).encode()
        + b"}"
    ),
    "duplicate field": blob(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":'
        + json.dumps(B).encode()
        + b"}"
    ),
    "name climbs out": blob({"../../etc/passwd": A, "b": B}),
    "name with dots": blob({"a..b": A, "b": B}),
    "absolute name": blob({"/etc/passwd": A, "b": B}),
    "name with newline": blob({"a\nb": A, "b": B}),
    "name with NUL": blob({"a\0": A, "b": B}),
    "endless name": blob({"a" * 10_000: A, "b": B}),
    "empty name": blob({"": A, "b": B}),
}


def test_a_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(blob({"a": A, "b": B}, struct.pack("<8f", *range(8))))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read(checkpoint.entries["a"]).tolist() == [[0, 1], [2, 3]]
    checkpoint.drop(checkpoint.entries["a"])
    assert checkpoint.read(checkpoint.entries["a"]).tolist() == [[0, 1], [2, 3]], "dropped pages come back"
    assert checkpoint.read(checkpoint.entries["b"]).tolist() == [4, 5, 6, 7]


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    (tmp_path / "model.safetensors").write_bytes(blob(header, b"\0" + struct.pack("<2f", 1.5, -2.0)))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read(checkpoint.entries["b"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Checkpoint(tmp_path)


def test_every_truncation_and_every_flipped_header_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path)
    for position in range(len(GOOD) - len(DATA)):
        damaged = bytearray(GOOD)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        try:
            entries = Checkpoint(tmp_path).entries.values()
        except CheckpointError:
            continue
        # Accepted: then it only renamed a tensor or changed a dtype of the same size.
        assert [(entry.num_bytes, entry.start) for entry in entries] == [
            (16, len(GOOD) - 32),
            (16, len(GOOD) - 16),
        ]


def shards(folder: Path) -> dict[str, object]:
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    save_file({"b": torch.ones(2)}, folder / "y.safetensors")
    return {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}


def _climbing(folder: Path) -> object:
    return {"weight_map": {"a": "../x.safetensors"}}


def _absolute(folder: Path) -> object:
    return {"weight_map": {"a": str(folder / "x.safetensors")}}


def _pickle(folder: Path) -> object:
    return {"weight_map": {"a": "pytorch_model.bin"}}


def _absent(folder: Path) -> object:
    return {"weight_map": {"a": "x.safetensors", "b": "z.safetensors"}}


def _swapped(folder: Path) -> object:
    return {"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}}


def _unlisted(folder: Path) -> object:
    save_file({"b": torch.ones(2), "c": torch.ones(2)}, folder / "y.safetensors")
    return {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}


def _unheld(folder: Path) -> object:
    return {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}}


def _twice(folder: Path) -> object:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "y.safetensors")
    return {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}


def _no_map(folder: Path) -> object:
    return {"metadata": {}}


def _number(folder: Path) -> object:
    return {"weight_map": {"a": 3}}


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file above the folder": (_climbing, r"index.json: a: .*not the name"),
    "absolute path": (_absolute, r"index.json: a: .*not the name"),
    "pickle": (_pickle, r"index.json: a: .*pytorch_model.bin.*not the name"),
    "absent file": (_absent, r"z.safetensors"),
    "tensors in each other's file": (_swapped, r"x.safetensors: a: .*says it is in y"),
    "tensor the index does not name": (_unlisted, r"y.safetensors: c: not named"),
    "tensor no file holds": (_unheld, r"y.safetensors: c: .*not in the file"),
    "tensor in two files": (_twice, r"y.safetensors: a: also in x"),
    "no weight_map": (_no_map, r"index.json: weight_map"),
    "file is a number": (_number, r"index.json: a: "),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_does_not_match_its_files_is_refused(tmp_path: Path, case: str) -> None:
    index, message = INDEXES[case]
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index(tmp_path)))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_shards_with_their_index_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards(tmp_path)))
    save_file({"stale": torch.ones(2)}, tmp_path / "left-over.safetensors")
    assert sorted(Checkpoint(tmp_path).entries) == ["a", "b"]


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(CheckpointError, match="2 .safetensors files, but no model.safetensors.index.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pt", "model.pth", "weights.ckpt", "m.pkl"]
)
def test_pickled_weights_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cposix\nsystem\n")
    with pytest.raises(CheckpointError, match=rf"{name}: .*run code"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        Checkpoint(tmp_path)


def test_a_pickle_renamed_to_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: not a valid"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("indexed", [True, False])
def test_weights_that_seem_to_belong_but_would_not_be_used_are_refused(
    tmp_path: Path, name: str, indexed: bool
) -> None:
    if indexed:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards(tmp_path)))
    else:
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    Checkpoint(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: would not be used"):
        Checkpoint(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a regular file"):
        Checkpoint(tmp_path)


def test_a_start_with_packed_weights_does_not_wait_for_a_pipe_either(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    store = PackedStore(folder, Recipe())
    load_model(folder, choose("cpu"), store=store)
    store.wait()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")

    def give_up(number: int, frame: FrameType | None) -> None:
        pytest.fail("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        with pytest.raises(CheckpointError, match=r"model.safetensors: not a regular file"):
            load_model(folder, choose("cpu"), store=store)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_files_may_be_links_as_in_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert sorted(Checkpoint(tmp_path / "snapshot").entries) == ["a", "b"]
