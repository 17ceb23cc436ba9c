"""A smaller checkpoint: what a mask keeps of a model, in the published format.

Experts that stay are copied byte for byte, under new numbers in the order of the old ones; routers lose the
rows of the others; everything else of the folder is copied as it is. Layers for multi-token prediction, which
no mask covers, are copied with all their experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint import (
    INDEX_FILE,
    PICKLES,
    SHARDS_FILE,
    SINGLE_FILE,
    Checkpoint,
    TensorEntry,
    list_weight_files,
)
from moe_runtime.errors import CheckpointError
from moe_runtime.experts import documents
from moe_runtime.experts.cut import Cut, Piece, check_cut
from moe_runtime.experts.cut_config import ONLY_OURS, cut_config
from moe_runtime.experts.documents import Document
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.weight_writer import Told, copy_file, read_metadata, write_file, write_pieces
from moe_runtime.experts.whole_folder import new_folder
from moe_runtime.hf_config import read_json
from moe_runtime.loader import CONFIG_FILE, read_model_config, require_model_folder
from moe_runtime.model_config import ModelConfig
from moe_runtime.plan import ExpertMask

MANIFEST, MANIFEST_KIND = "pruning_manifest.json", "pruning_manifest"
# In a folder of its own: some engines load every .safetensors file beside config.json.
GHOST_ROUTER = "pruning/ghost_router.safetensors"
OTHER_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", *PICKLES)
ANY_ENGINE = "every engine that loads the full model loads this one"
EXTRA_LAYERS = (
    "layers for multi-token prediction are copied with all their experts; engines leave them aside unless "
    "they draft with them, which needs the full model's config.json"
)


@dataclass(frozen=True)
class Provenance:
    """What the manifest tells of a mask's making.

    body    plain JSON: scenario, score, seed, what a certificate measured, ...
    inputs  digests by name of the files it was made from
    """

    body: Mapping[str, Any]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Export:
    """``target`` and its manifest; ``notes``: who can load it, and what is special about it."""

    target: Path
    manifest: Document
    notes: tuple[str, ...]


def export(
    model_dir: Path,
    mask: ExpertMask,
    target: Path,
    provenance: Provenance,
    *,
    allow_non_uniform: bool = False,
    ghost_router: bool = False,
) -> Export:
    """Write the model that ``mask`` leaves of the one in ``model_dir`` as a new folder ``target``, complete
    or not at all. ``ghost_router`` also keeps the full routers, in a file that no engine loads by itself.

    Memory: a few megabytes. Raises PlanError for a mask that cannot be exported, a target that exists or a
    full disk; CheckpointError for a model that cannot be read.
    """
    require_model_folder(model_dir)
    checkpoint = Checkpoint(model_dir)
    values = read_json(model_dir / CONFIG_FILE)
    architecture, config = read_model_config(model_dir, checkpoint.common_dtype())
    check_cut(config, mask)
    new_values = cut_config(values, architecture, config, mask, allow_non_uniform=allow_non_uniform)
    entries = _in_file_order(checkpoint)
    cut = Cut(architecture.NAMES, mask)
    shards = _shards(cut.pieces(entries), has_index=(model_dir / INDEX_FILE).exists())
    ghosts = cut.routers(entries) if ghost_router else []
    others, left_out = _other_files(model_dir)
    config_text, notes = _render(new_values), _notes(mask, config)
    kept_bytes = sum(piece.num_bytes for pieces in shards.values() for piece in pieces)
    total = (
        kept_bytes + sum(piece.num_bytes for piece in ghosts) + sum(path.stat().st_size for path in others)
    )
    with new_folder(target, total) as folder, Progress("export", total, "bytes") as progress:
        writer = _Writer(folder, progress.advance)
        for name, pieces in shards.items():
            writer.weights(name, pieces)
        if (model_dir / INDEX_FILE).exists():
            writer.text(INDEX_FILE, _render(_index(shards, kept_bytes)))
        if ghosts:
            writer.weights(GHOST_ROUTER, ghosts)
        for path in others:
            writer.copy(path)
        body = {
            **provenance.body,
            "mask": mask.to_json(),
            "mask_digest": mask.digest,
            "config": _changes(values, new_values),
            "bytes": {"full": sum(entry.num_bytes for entry in entries), "kept": kept_bytes},
            "ghost_router": GHOST_ROUTER if ghosts else None,
            "left_out": left_out,
            "notes": notes,
            "files": {**writer.digests, CONFIG_FILE: hashlib.sha256(config_text).hexdigest()},
        }
        manifest = documents.save(folder / MANIFEST, MANIFEST_KIND, body, provenance.inputs)
        # Last: until it is there, this is no model.
        writer.text(CONFIG_FILE, config_text)
        _check(folder, shards, mask)
    return Export(target, manifest, tuple(notes))


class _Writer:
    """Files of the new folder, and the SHA-256 of each."""

    def __init__(self, folder: Path, told: Told) -> None:
        self._folder = folder
        self._told = told
        self.digests: dict[str, str] = {}

    def weights(self, name: str, pieces: Sequence[Piece]) -> None:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        metadata = read_metadata(pieces[0].source.path)
        self.digests[name] = write_pieces(path, pieces, metadata, self._told)

    def copy(self, source: Path) -> None:
        self.digests[source.name] = copy_file(source, self._folder / source.name, self._told)

    def text(self, name: str, text: bytes) -> None:
        self.digests[name] = write_file(self._folder / name, iter([text]), self._told)


def _in_file_order(checkpoint: Checkpoint) -> list[TensorEntry]:
    return sorted(checkpoint.entries.values(), key=lambda entry: (entry.path.name, entry.start, entry.name))


def _shards(pieces: Sequence[Piece], *, has_index: bool) -> dict[str, list[Piece]]:
    """By the name of the new file: what stays of each old one; those of which nothing stays are gone."""
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.source.path, []).append(piece)
    if not has_index:
        return {SINGLE_FILE: list(pieces)}
    return {
        f"model-{number:05d}-of-{len(by_file):05d}.safetensors": found
        for number, found in enumerate(by_file.values(), 1)
    }


def _index(shards: Mapping[str, Sequence[Piece]], num_bytes: int) -> dict[str, Any]:
    weight_map = {piece.name: name for name, pieces in shards.items() for piece in pieces}
    return {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _other_files(model_dir: Path) -> tuple[list[Path], list[str]]:
    """What to copy of the folder beside weights and config, and the names of what is left out: folders (their
    plans and packed weights are of the full model), weights in other forms, manifests of what is there.
    """
    ours = {path.name for path in list_weight_files(model_dir)} | {CONFIG_FILE, INDEX_FILE}
    copied, left_out = [], []
    for path in sorted(model_dir.iterdir()):
        if path.name in ours:
            continue
        is_weights = path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in (MANIFEST, SHARDS_FILE):
            copied.append(path)
        else:
            left_out.append(path.name)
    return copied, left_out


def _notes(mask: ExpertMask, config: ModelConfig) -> list[str]:
    notes = [ANY_ENGINE if mask.is_uniform else ONLY_OURS]
    return [*notes, EXTRA_LAYERS] if config.num_extra_layers else notes


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Field of config.json -> what it was and what it is."""
    names = sorted(old.keys() | new.keys())
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}


def _render(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _check(folder: Path, shards: Mapping[str, Sequence[Piece]], mask: ExpertMask) -> None:
    """Read what was written, as a loader would. Raises CheckpointError."""
    written = Checkpoint(folder)
    _, config = read_model_config(folder, written.common_dtype())
    wanted = {piece.name: (piece.source.dtype, piece.shape) for pieces in shards.values() for piece in pieces}
    found = {entry.name: (entry.dtype, entry.shape) for entry in written.entries.values()}
    if found != wanted:
        raise CheckpointError(f"wrote {len(found)} tensors, {len(wanted)} were to be written; try again")
    for layer, kept in mask.kept.items():
        if config.moe_of(layer).num_experts != len(kept):
            raise CheckpointError(
                f"layer {layer} has {config.moe_of(layer).num_experts} experts, {len(kept)} are kept",
                file=CONFIG_FILE,
            )
