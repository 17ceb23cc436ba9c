"""Documents and model identities: every changed byte is found, no half of a file is ever there."""

import json
import os
import sys
from pathlib import Path

import pytest
from world import edit_config, tiny_checkpoint

from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.whole_file import replacing

BODY = {"unseen": {3: [1, 2], 10: []}, "share": 0.1, "name": "理财"}


def test_a_document_comes_back_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/moe-experts", "plan", "/tmp/a.json", "--out=/tmp/b", "c/d"])
    made = documents.save(tmp_path / "plan.json", "plan", BODY, {"statistics": "abc"})
    assert documents.load(tmp_path / "plan.json", "plan") == made
    assert made.command == "moe-experts plan a.json --out=b c/d"
    assert made.body == {"unseen": {"3": [1, 2], "10": []}, "share": 0.1, "name": "理财"}
    assert made.inputs == {"statistics": "abc"} and len(made.digest) == 64


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    documents.save(path, "plan", BODY, {})
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(PlanError, match=r"^plan\.json: "):
            documents.load(path, "plan")
    path.write_bytes(data + b"\n")
    with pytest.raises(PlanError, match="was changed"):
        documents.load(path, "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "certificate"}, "a 'certificate', expected a 'plan'"),
        ({"format": 2}, "format 2, this version reads 1"),
        ({"extra": 1}, "not a document"),
    ],
)
def test_other_kinds_and_formats_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "plan.json"
    documents.save(path, "plan", BODY, {})
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(PlanError, match=message):
        documents.load(path, "plan")


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"kind": NaN}', b"[" * 100_000])
def test_what_is_no_document_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(PlanError, match=r"^plan\.json: not a"):
        documents.load(tmp_path / "plan.json", "plan")
    with pytest.raises(PlanError, match="No such file"):
        documents.load(tmp_path / "none.json", "plan")


def test_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        documents.save(tmp_path / "plan.json", "plan", {"kl": float("nan")}, {})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="x cannot be written to .*: No space left"), replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_identity_says_what_differs(tmp_path: Path) -> None:
    one, same, other = (
        tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    known = ModelIdentity.of(one)
    assert ModelIdentity.of(same) == known == ModelIdentity.from_json(known.to_json())
    known.check(ModelIdentity.of(same), "x.stats")
    edit_config(other, rope_theta=5000.0)
    with pytest.raises(PlanError, match="x.stats was made for another model: its weights and config differ"):
        known.check(ModelIdentity.of(other), "x.stats")
    (same / "tokenizer.json").write_text("{}")
    assert known.difference(ModelIdentity.of(same)) == "tokenizer"
    (same / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        ModelIdentity.of(same)


def test_an_identity_minds_every_byte_of_the_weights_and_not_how_the_config_is_laid_out(
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(tmp_path, shards=2)
    known = ModelIdentity.of(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7, sort_keys=True))
    assert ModelIdentity.of(folder) == known
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert known.difference(ModelIdentity.of(folder)) == "weights"


@pytest.mark.parametrize("value", [None, {}, {"weights": "a", "config": "b", "tokenizer": 1}, []])
def test_what_is_no_identity_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        ModelIdentity.from_json(value)
