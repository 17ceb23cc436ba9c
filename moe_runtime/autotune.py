"""--autotune-dir: tiles of the GPU's matrix products, measured once for this model on this chip, and kept.

What is chosen here changes no bit of any result (``Tile`` in kernels/triton/tiles.py), so neither do a file
from elsewhere, a noisy measurement or none. Kept as JSON in a folder that nobody else can write to; an entry
is named by chip, Triton's version, operation, format, shape and number of rows, and holds the tile, or null
where tiles.py's own choice was as fast, beside the seconds that said so.
"""

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moe_runtime.errors import ConfigError
from moe_runtime.kernels.triton.tiles import (
    FEW_TOKENS,
    SMALL_PAIRS,
    TUNED_SIZES,
    Choice,
    Tile,
    candidates,
    linear_segments,
    tuned_size,
)
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceLinear, padded_k
from moe_runtime.layers.decoder import Decoder
from moe_runtime.packed_file import PackedFileError, open_owned
from moe_runtime.packed_folder import NewFile, open_folder

LOGGER = logging.getLogger(__name__)
FILE = "tiles.json"
MAX_FILE_BYTES = 4 << 20
COPIES = 8  # weights of one shape that take turns, so that the L2 cache has lost what a call reads
SAMPLES = 9
GAIN = 0.97  # of the time without it: what a choice must stay below to be more than noise
SPLIT_ROWS = 256  # dense layers of more rows have programs enough

Packed: TypeAlias = DeviceLinear | DeviceExperts
# Median seconds of running all calls, one after the other; None where the chip has no room for the tile.
Clock: TypeAlias = Callable[[Sequence[Callable[[], object]]], float | None]


def autotune(
    model: Decoder, folder: Path, max_tokens: int, clock: Clock | None = None, chip: str | None = None
) -> int:
    """Gives the model's weights their tiles for steps of up to ``max_tokens``; how many were measured for it.

    Before graphs are captured. Raises ConfigError for a folder that is not ours or cannot be written.
    """
    if model.device.type == "cpu":
        LOGGER.warning("--autotune-dir: there is no GPU to measure, nothing is tuned")
        return 0
    clock, chip = clock or gpu_clock, chip or _chip(model.device)
    try:
        with open_folder(folder, links=True, make=True, mode=0o700) as descriptor:
            known = _read(descriptor)
            found: dict[str, Any] = {}
            for name, packed in _by_shape(model).items():
                top_k = min(model.config.moe.top_k, getattr(packed[0], "num_experts", 1))
                for size in _sizes(max_tokens * top_k):
                    key = f"{chip} | {name} | {size}"
                    entry = known.get(key)
                    if entry is None or not _is_current(entry, packed[0], size):
                        LOGGER.info("measuring tiles: %s", key)
                        entry = found[key] = _measure(packed, size, top_k, clock)
                    _give(packed, size, _choice(entry))
            if found:
                _write(descriptor, _read(descriptor) | found)
    except (OSError, PackedFileError) as error:
        raise ConfigError(f"--autotune-dir {folder}: {error}; choose a folder of your own") from error
    return len(found)


# --- what to measure ----------------------------------------------------------------------------------------


def _by_shape(model: Decoder) -> dict[str, list[Packed]]:
    """Weights that the tiled products read, those of one format and shape together."""
    shapes: dict[str, dict[int, Packed]] = {}
    for slot in model.slots():
        for place in () if slot.any_float else slot.places:  # routers have a kernel of their own
            packed = getattr(place.owner, place.attribute, None)
            if isinstance(packed, DeviceExperts):
                kind, sizes = "experts", [packed.num_experts, packed.intermediate, packed.hidden]
            elif isinstance(packed, DeviceLinear) and packed.heads == 1:
                kind, sizes = "linear", [packed.out_features, packed.in_features]
            else:
                continue
            shape = f"{kind} | {packed.format} | {' x '.join(map(str, sizes))}"
            shapes.setdefault(shape, {})[id(packed)] = packed
    return {shape: list(packed.values()) for shape, packed in shapes.items()}


def _sizes(most: int) -> Iterator[int]:
    yield from (size for size in TUNED_SIZES if size <= tuned_size(most))


def _choices(packed: Packed, size: int) -> list[Choice]:
    kind = packed.format.kind
    splits = [False]
    if isinstance(packed, DeviceLinear) and size <= SPLIT_ROWS:
        padded = padded_k(kind, packed.in_features)
        splits += [True] if linear_segments(packed.out_features, padded, kind) > 1 else []
    few = isinstance(packed, DeviceExperts) and size <= SMALL_PAIRS
    tiles = [tile for tile in candidates(kind, size) if not few or tile.tokens <= FEW_TOKENS]
    return [(tile, split) for tile in tiles for split in splits]


# --- measuring ----------------------------------------------------------------------------------------------


def _measure(packed: Sequence[Packed], size: int, top_k: int, clock: Clock) -> dict[str, Any]:
    """The entry of these weights, all of one shape, for ``size`` rows or pairs."""
    some = packed[:COPIES]
    calls = [_call(weights, size, top_k, seed) for seed, weights in enumerate(some)]
    _give(some, size, None)
    usual = clock(calls)
    if usual is None:
        raise ConfigError(f"--autotune-dir: {packed[0].format} weights do not run with tiles.py's own choice")
    best, least = None, usual * GAIN
    for choice in _choices(packed[0], size):
        _give(some, size, choice)
        seconds = clock(calls)
        if seconds is not None and seconds < least:
            best, least = choice, seconds
    tile = None if best is None else asdict(best[0]) | {"split": best[1]}
    return {"tile": tile, "seconds": usual if best is None else least, "untuned": usual}


def _call(weights: Packed, size: int, top_k: int, seed: int) -> Callable[[], object]:
    """One product of ``weights`` with ``size`` rows, or pairs of random experts."""
    from moe_runtime.kernels.triton.fused_moe import expert_rows
    from moe_runtime.kernels.triton.linear import linear

    generator = torch.Generator().manual_seed(seed)
    if isinstance(weights, DeviceLinear):
        x = torch.randn(size, weights.in_features, generator=generator).to(weights.data.device)
        return lambda: linear(x, weights)
    tokens, device = max(size // top_k, 1), weights.down.data.device
    x = torch.randn(tokens, weights.hidden, generator=generator).to(device)
    scores = torch.rand(tokens, weights.num_experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices.int().to(device)
    shares = torch.full((tokens, top_k), 1 / top_k, device=device)
    return lambda: expert_rows(x, ids, shares, weights)


def _give(packed: Sequence[Packed], size: int, choice: Choice | None) -> None:
    for weights in packed:
        tuned = weights.tuned if isinstance(weights, DeviceExperts) else weights.matrix.tuned
        if choice is None:
            tuned.pop(size, None)
        else:
            tuned[size] = choice


def gpu_clock(calls: Sequence[Callable[[], object]]) -> float | None:
    """A Clock of replays of a captured graph, so that launching does not count."""
    from triton.runtime.errors import OutOfResources

    try:
        for call in calls:  # compiles
            call()
    except OutOfResources:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(SAMPLES + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples[1:])


def _chip(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)} | triton {triton.__version__}"


# --- the file -----------------------------------------------------------------------------------------------


def _is_current(entry: Any, packed: Packed, size: int) -> bool:
    """Whether an entry of the file is what ``_measure`` of today could have written."""
    if not isinstance(entry, dict) or "tile" not in entry:
        return False
    tiles = [asdict(tile) | {"split": split} for tile, split in _choices(packed, size)]
    return entry["tile"] is None or entry["tile"] in tiles


def _choice(entry: dict[str, Any]) -> Choice | None:
    if entry["tile"] is None:
        return None
    sizes = dict(entry["tile"])
    split = sizes.pop("split")
    return Tile(**sizes), split


def _read(folder: int) -> dict[str, Any]:
    """All entries, unchecked; none where there is no file or one that says nothing."""
    try:
        descriptor, size = open_owned(FILE, folder)
    except FileNotFoundError:
        return {}
    with open(descriptor, "rb") as file:
        data = file.read(MAX_FILE_BYTES) if size <= MAX_FILE_BYTES else b""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        LOGGER.warning("%s of --autotune-dir is damaged: tiles are measured anew", FILE)
        return {}
    return entries


def _write(folder: int, entries: dict[str, Any]) -> None:
    file = NewFile(folder, FILE)
    try:
        with open(file.descriptor, "w", encoding="utf-8", closefd=False) as text:
            json.dump(entries, text, indent=1, sort_keys=True)
        os.fsync(file.descriptor)
        file.publish()
    finally:
        file.close()
