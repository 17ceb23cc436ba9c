"""Domain expert shards: a model folder with one file of experts per scenario.

The experts that exactly one scenario keeps are that scenario's shard; those that several keep are in
``shared``, those that none keeps in ``rest``, and what is no routed expert in ``base``. Together they are an
ordinary checkpoint, byte for byte the old one's tensors, which other engines load, too. Files of shards may
be taken away: a server that needs none of their experts starts and runs without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from moe_runtime import loader
from moe_runtime.checkpoint import INDEX_FILE, SHARDS_FILE, Checkpoint, TensorEntry
from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.cut import Piece
from moe_runtime.experts.model_identity import SHARDS_KIND, ModelIdentity
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.registry import Scenario
from moe_runtime.experts.weight_writer import copy_file, write_pieces
from moe_runtime.experts.whole_file import replacing
from moe_runtime.experts.whole_folder import new_folder

# By shard: its tensors, and its experts by decoder layer.
Groups: TypeAlias = dict[str, tuple[list[TensorEntry], dict[int, list[int]]]]
BASE, SHARED, REST = "base", "shared", "rest"


@dataclass(frozen=True)
class Shard:
    """``experts``: ids by decoder layer."""

    name: str
    file: str
    num_bytes: int
    experts: Mapping[int, list[int]]


def owner_of(layer: int, expert: int, scenarios: Mapping[str, Mapping[int, tuple[int, ...]]]) -> str:
    """The shard of an expert; ``scenarios``: what each keeps, by layer."""
    keepers = [name for name, kept in scenarios.items() if expert in kept.get(layer, ())]
    return keepers[0] if len(keepers) == 1 else SHARED if keepers else REST


def write_shards(model_dir: Path, scenarios: list[Scenario], out: Path) -> list[Shard]:
    """Split the model in ``model_dir`` by the masks of ``scenarios`` into the new folder ``out``, which is
    there when all is written. Raises PlanError, CheckpointError.
    """
    taken = {BASE, SHARED, REST}.intersection(scenario.name for scenario in scenarios)
    if not scenarios or taken:
        what = f"a scenario is called {taken.pop()}" if taken else "there is no scenario"
        raise PlanError(f"the experts cannot be split: {what}")
    model = ModelIdentity.of(model_dir)
    groups = _groups(model_dir, scenarios)
    others = _other_files(model_dir)
    shards = [
        Shard(name, _file_of(name), sum(entry.num_bytes for entry in entries), experts)
        for name, (entries, experts) in groups.items()
    ]
    tensor_bytes = sum(shard.num_bytes for shard in shards)
    total = tensor_bytes + sum(path.stat().st_size for path in others)
    with new_folder(out, total) as folder, Progress("shard", total, "bytes") as progress:
        digests = {}
        for shard in shards:
            pieces = [Piece.whole(entry, entry.name) for entry in groups[shard.name][0]]
            path = folder / shard.file
            digests[shard.name] = write_pieces(path, pieces, {"format": "pt"}, progress.advance)
        _write_index(folder, groups, tensor_bytes)
        body = {
            "model": model.to_json(),
            "plans": {scenario.name: scenario.plan_digest for scenario in scenarios},
            "shards": {
                shard.name: {
                    "file": shard.file,
                    "sha256": digests[shard.name],
                    "bytes": shard.num_bytes,
                    "experts": shard.experts,
                }
                for shard in shards
            },
        }
        documents.save(folder / SHARDS_FILE, SHARDS_KIND, body, {"weights": model.weights})
        for path in others:  # config.json last: until it is there, this is no model
            copy_file(path, folder / path.name, progress.advance)
    return shards


def _file_of(shard: str) -> str:
    return f"{shard}.safetensors" if shard == BASE else f"experts-{shard}.safetensors"


def _write_index(folder: Path, groups: Groups, tensor_bytes: int) -> None:
    files = {entry.name: _file_of(name) for name, (entries, _) in groups.items() for entry in entries}
    index = {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(files.items()))}
    with replacing(folder / INDEX_FILE) as file:
        file.write(json.dumps(index, indent=1).encode() + b"\n")


def _groups(model_dir: Path, scenarios: list[Scenario]) -> Groups:
    """Tensors and experts of every shard, in the order of the files."""
    kept = {scenario.name: scenario.mask.kept for scenario in scenarios}
    experts_of = loader.expert_tensors(model_dir)
    names = [BASE, SHARED, *sorted(kept), REST]
    groups: Groups = {name: ([], {}) for name in names}
    for name, entry in sorted(Checkpoint(model_dir).entries.items()):
        found = experts_of.get(name)
        shard = BASE if found is None else owner_of(*found, kept)
        entries, experts = groups[shard]
        entries.append(entry)
        if found is not None and found[1] not in experts.setdefault(found[0], []):
            experts[found[0]].append(found[1])
    for _, experts in groups.values():
        for ids in experts.values():
            ids.sort()
    return {name: group for name, group in groups.items() if group[0]}


def _other_files(model_dir: Path) -> list[Path]:
    """Everything of the model folder but its weights and folders, config.json last."""
    found = [
        path
        for path in sorted(model_dir.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX_FILE, SHARDS_FILE)
    ]
    return sorted(found, key=lambda path: path.name == loader.CONFIG_FILE)
