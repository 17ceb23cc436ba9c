"""Loads a model folder: config, then every tensor from the mapped file straight into its final home.

All that can be wrong with a checkpoint is found here and raised as CheckpointError, never at the first token.
Peak memory is the weights plus the matrices under way: at most one per thread of the kernels, and one more.
"""

import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import moe_runtime._C as _C
from moe_runtime.checkpoint import Checkpoint, TensorEntry
from moe_runtime.errors import CheckpointError
from moe_runtime.expert_room import ExpertRoom
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.hf_config import Fields, read_json
from moe_runtime.kernels import Kernels, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import ModelConfig
from moe_runtime.models import Architecture, find_architecture
from moe_runtime.packed_file import PackedFile, PackedFileError
from moe_runtime.packed_model import is_packed, restore, stored_dtype
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.fp8 import SCALE_SUFFIX, Fp8Weight, keep_codes
from moe_runtime.quant.int4 import Int4Weight, find_int4
from moe_runtime.quant.plain import PlainWeight, refuse
from moe_runtime.quant.quality import Gate
from moe_runtime.quant.recipe import Converted, Recipe

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FP8 = "F8_E4M3"

StoredWeight = PlainWeight | Fp8Weight | Int4Weight


def load_model(
    model_dir: Path,
    kernels: Kernels,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    store: PackedStore | None = None,
    gate: Gate | None = None,
    room: ExpertRoom | None = None,
) -> Decoder:
    """The model in ``model_dir``, ready for ``forward``, in the formats of ``recipe``; with a ``store``, from
    the packed file of an earlier start, or into one for the next; with a ``gate``, only if it lets it pass;
    its experts where the ``room`` is.

    Raises CheckpointError naming file and tensor; PlanError and ConfigError as the room does.
    """
    require_model_folder(model_dir)
    packed = None if store is None else store.open()
    known = None if gate is None or store is None else store.read_finding()
    if gate is not None:
        gate.prepare(known, lambda: _pack(model_dir, kernels, Recipe(), room))
    restored = None
    if store is not None and packed is not None:
        restored = _restore(model_dir, kernels, store, packed, room)
    model = restored or _pack(model_dir, kernels, recipe, room)
    if gate is not None:
        found = gate.measure(model)
        if store is not None and found != known:
            store.keep_finding(found)  # a refused model, too, is measured but once
        gate.check(found)
    if store is not None and restored is None and is_packed(model):
        store.save(model)
    return model


def _pack(model_dir: Path, kernels: Kernels, recipe: Recipe, room: ExpertRoom | None) -> Decoder:
    """The model from its checkpoint."""
    checkpoint, ghosts = Checkpoint(model_dir), None if room is None else room.ghosts
    architecture, config = read_model_config(model_dir, checkpoint.common_dtype(), ghosts)
    if ghosts is not None:
        ghosts.apply(checkpoint, architecture.NAMES)
    model = architecture.build(config, kernels)
    if room is not None:
        room.place(model, kernels, recipe, lambda: find_weights(model, checkpoint, recipe))
    weight_bytes = fill(model, checkpoint, recipe)
    model.config = replace(config, weight_bytes=weight_bytes)
    return model


def _restore(
    model_dir: Path, kernels: Kernels, store: PackedStore, packed: PackedFile, room: ExpertRoom | None
) -> Decoder | None:
    """The model from its packed file, if it fits."""
    try:
        ghosts = None if room is None else room.ghosts
        architecture, config = read_model_config(model_dir, stored_dtype(packed), ghosts)
        model = architecture.build(config, kernels)
        if room is not None:
            room.place(model, kernels, store.recipe, list)  # the CPU's kernels have no sizes to ask for
        restore(model, packed)
    except PackedFileError as error:
        store.refuse(error)
        return None
    return model


def require_model_folder(model_dir: Path) -> None:
    """Raises CheckpointError unless the folder has the files that say what the model and its text are, and
    the text is not another program's business.
    """
    if not model_dir.is_dir():
        raise CheckpointError("not a folder", file=str(model_dir))
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if not (model_dir / name).is_file():
            raise CheckpointError(f"missing from {model_dir}", file=name)
    path = model_dir / TOKENIZER_CONFIG_FILE
    if path.exists():
        # Where a folder brings a tokenizer of its own, tokenizer.json need not say the same.
        _check_auto_map(read_json(path).get("auto_map"), frozenset(), path.name)


def read_model_config(
    model_dir: Path, default_dtype: str | None, ghosts: GhostRouter | None = None
) -> tuple[Architecture, ModelConfig]:
    """The architecture and its checked config; ``default_dtype`` serves configs that do not name one. With
    ``ghosts``, of the uncut model.
    """
    values = read_json(model_dir / CONFIG_FILE)
    values = values if ghosts is None else ghosts.uncut(values)
    if values.get("dtype") is None and values.get("torch_dtype") is None:
        values["dtype"] = default_dtype
    architecture = find_architecture(values.get("model_type"), values.get("architectures"))
    _check_auto_map(values.pop("auto_map", None), getattr(architecture, "PUBLISHED_CODE", frozenset()))
    config = architecture.read_config(Fields(values))
    if (model_dir / GENERATION_FILE).exists():
        generation = Fields(read_json(model_dir / GENERATION_FILE), GENERATION_FILE)
        stops = generation.integers("eos_token_id", 0, config.vocab_size - 1)
        config = replace(config, eos_token_ids=stops or config.eos_token_ids)
    return architecture, config


def _check_auto_map(auto_map: object, published: frozenset[str], file: str = CONFIG_FILE) -> None:
    """Code that comes with a checkpoint is never run; a map to code we implement ourselves is harmless."""
    if auto_map is None:
        return
    classes = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for name in classes:
        if not isinstance(name, str) or name not in published:
            raise CheckpointError(
                f"auto_map asks for custom code ({str(name)[:80]}), which is never run", file=file
            )


def find_weights(model: Decoder, checkpoint: Checkpoint, recipe: Recipe) -> list[StoredWeight]:
    """What the checkpoint has for each slot; names, shapes and dtypes fit. No byte of weights is read."""
    dtype: torch.dtype = getattr(torch, model.config.dtype)
    stored = [
        _find(slot, checkpoint, model.config, dtype)
        for slot in model.slots()  # one by one: see _find
        if not (slot.absent and slot.name.rpartition(".")[0] in checkpoint.left_out)
    ]
    wanted = {entry.name for weight in stored for entry in weight.entries}
    for name, entry in checkpoint.entries.items():
        if name not in wanted and not model.ignores(name):
            _refuse_leftover(entry, wanted, model.config)
    for weight in stored:
        weight.check()
    return keep_codes(stored, recipe.formats)


def fill(model: Decoder, checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Write every tensor of the checkpoint into the slot that wants it; the weights' size in bytes.

    All names, shapes and dtypes are compared before the first byte of weights is read. Of experts that are
    absent none is.
    """
    dtype: torch.dtype = getattr(torch, model.config.dtype)
    found = find_weights(model, checkpoint, recipe)
    stored = [weight for weight in found if not weight.slot.absent]
    checkpoint.sparse = len(stored) < len(found)
    weight_bytes = 0
    for weight, converted in _converted(stored, checkpoint, recipe, dtype):
        converted.hand_over()
        weight_bytes += converted.num_bytes
        for entry in weight.entries:
            checkpoint.drop(entry)
    return weight_bytes


def fill_experts(
    model: Decoder, checkpoint: Checkpoint, recipe: Recipe, wanted: Mapping[int, Collection[int]]
) -> None:
    """As ``fill``, of these experts alone, by decoder layer; the model has everything else."""
    dtype: torch.dtype = getattr(torch, model.config.dtype)
    homes = {id(mixture.experts): wanted.get(number, ()) for number, mixture in model.mixtures()}
    stored = [
        weight
        for weight in find_weights(model, checkpoint, recipe)
        if weight.slot.places and weight.slot.expert[0] in homes.get(id(weight.slot.places[0].owner), ())
    ]
    checkpoint.sparse = True
    for weight, converted in _converted(stored, checkpoint, recipe, dtype):
        converted.hand_over()
        for entry in weight.entries:
            checkpoint.drop(entry)


def expert_tensors(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Which tensors of a checkpoint are whose: by name, decoder layer and id of a routed expert. Raises
    CheckpointError.
    """
    require_model_folder(model_dir)
    checkpoint = Checkpoint(model_dir)
    architecture, config = read_model_config(model_dir, checkpoint.common_dtype())
    model = architecture.build(config, choose("reference"))
    layer_of = {id(mixture.experts): number for number, mixture in model.mixtures()}
    found: dict[str, tuple[int, int]] = {}
    for weight in find_weights(model, checkpoint, Recipe()):
        owner = weight.slot.places[0].owner if weight.slot.places else None
        if id(owner) not in layer_of:
            continue
        for entry in weight.entries:
            expert = (layer_of[id(owner)], weight.slot.expert[0])
            if found.setdefault(entry.name, expert) != expert:
                raise CheckpointError("holds several experts, so they cannot be parted", tensor=entry.name)
    return found


def _converted(
    stored: Sequence[StoredWeight], checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype
) -> Iterator[tuple[StoredWeight, Converted]]:
    """Each weight read and in its format, in the model's order (so that tensors stacked into one matrix come
    together, whatever file they are in). A few are under way at once, one thread each: torch's own threads
    wait for each other after every operation, which costs more than it brings on small matrices.
    """

    def convert(weight: StoredWeight) -> tuple[StoredWeight, Converted]:
        return weight, recipe.convert(weight.slot, weight.read(checkpoint), dtype)

    num_threads, torch_threads = _C.num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="moe-loader")
    under_way: deque[Future[tuple[StoredWeight, Converted]]] = deque()
    try:
        for weight in stored:
            under_way.append(pool.submit(convert, weight))
            if len(under_way) > num_threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _find(slot: Slot, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> StoredWeight:
    """The slot's weight in the form the checkpoint holds it. As the first one missing is an error, a config
    that claims a billion layers costs nothing.
    """
    if config.int4 is not None:
        int4 = find_int4(slot, checkpoint, config.int4)
        if int4 is not None:
            return int4
    entry = checkpoint.entries.get(slot.name)
    if entry is None:
        shard = checkpoint.left_out.get(slot.name.rpartition(".")[0])
        hint = f": {shard} is not in the folder" if shard else _expert_hint(slot.name, config)
        raise CheckpointError(f"missing from the checkpoint{hint}", tensor=slot.name)
    if config.fp8 is not None and entry.dtype == FP8 and len(slot.shape) == 2:
        scale = checkpoint.entries.get(f"{slot.name}{SCALE_SUFFIX}")
        return Fp8Weight(slot, entry, scale, config.fp8, dtype)
    return PlainWeight(slot, entry, dtype)


def _refuse_leftover(entry: TensorEntry, wanted: Collection[str], config: ModelConfig) -> None:
    if entry.name.removesuffix(SCALE_SUFFIX) in wanted:
        raise refuse(entry, "scales for a tensor that is not float8")
    raise refuse(entry, f"no part of a {config.model_type} model{_expert_hint(entry.name, config)}")


def _expert_hint(name: str, config: ModelConfig) -> str:
    match = re.search(r"\.experts\.(\d+)\.", name)
    if match is None:
        return ""
    counts = sorted({*config.num_experts_per_layer} - {0}) or [config.moe.num_experts]
    told = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f" (config.json says {told} experts per layer)"
