"""Which model a file was made for: digests of its weights, its config and its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moe_runtime.canonical_json import digest
from moe_runtime.checkpoint import SHARDS_FILE, list_weight_files
from moe_runtime.errors import PlanError
from moe_runtime.experts.documents import load
from moe_runtime.experts.file_digests import DigestMemo, file_digests
from moe_runtime.hf_config import read_json

SHARDS_KIND = "expert_shards"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """SHA-256, hexadecimal. weights: of all weight files' names and whole contents, in order of name; config:
    of config.json's values, however they are laid out; tokenizer: of tokenizer.json.
    """

    weights: str
    config: str
    tokenizer: str

    @classmethod
    def of(cls, model_dir: Path, memo: DigestMemo | None = None) -> ModelIdentity:
        """Reads every byte of the model, once per process and version of a file; with a ``memo`` only of
        weight files that it does not know. A folder of shards (shards.py) is the model that it was made of,
        whichever of them are there. Raises CheckpointError, and PlanError for shards that are not what they
        were.
        """
        config = digest(read_json(model_dir / "config.json"))
        files = sorted(list_weight_files(model_dir), key=lambda path: path.name)
        found = file_digests(files) if memo is None else memo.digests(files)
        if (model_dir / SHARDS_FILE).exists():
            return cls._of_shards(
                model_dir, config, dict(zip((path.name for path in files), found, strict=True))
            )
        lines = "".join(f"{each}  {path.name}\n" for each, path in zip(found, files, strict=True))
        weights = hashlib.sha256(lines.encode()).hexdigest()
        return cls(weights, config, file_digests([model_dir / "tokenizer.json"])[0])

    @classmethod
    def _of_shards(cls, model_dir: Path, config: str, found: Mapping[str, str]) -> ModelIdentity:
        """``found``: digests of the files that are there."""
        body = load(model_dir / SHARDS_FILE, SHARDS_KIND).body
        wanted = {shard["file"]: shard["sha256"] for shard in body["shards"].values()}
        for name, each in found.items():
            if wanted.get(name) != each:
                raise PlanError(f"{name} is not the file that {SHARDS_FILE} lists; split the model again")
        made_of = cls.from_json(body["model"])
        cls(made_of.weights, config, file_digests([model_dir / "tokenizer.json"])[0]).check(
            made_of, SHARDS_FILE
        )
        return made_of

    def difference(self, other: ModelIdentity) -> str:
        """What differs, in words: "weights and tokenizer"; empty if nothing does."""
        return " and ".join(
            field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)
        )

    def check(self, other: ModelIdentity, what: str) -> None:
        """Raises PlanError unless ``what``, which was made for ``other``, fits this model."""
        if different := self.difference(other):
            raise PlanError(f"{what} was made for another model: its {different} differ; make it again")

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ModelIdentity:
        """Raises PlanError for anything but what ``to_json`` gives."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            raise PlanError(f"a model's identity needs exactly {', '.join(sorted(names))}")
        if not all(isinstance(part, str) for part in value.values()):
            raise PlanError("a model's identity consists of digests as text")
        return cls(**value)
