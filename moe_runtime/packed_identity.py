"""What packed weights follow from: checkpoint, recipe, and the programs between them.

Of a weight file these are name, size, time, header, and samples of its contents. Like ``make`` this trusts
that who changes a file changes one of them; reading all of it would take as long as packing it again.
"""

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint import list_weight_files, open_regular, read_header_bytes
from moe_runtime.plan import ExpertMask
from moe_runtime.quant.recipe import CONVERSION_VERSION, Recipe
from moe_runtime.quant.rounding import ROUNDING_VERSION

WEIGHT_FILES = "weight files"
EXPERTS = "set of experts"  # absent where it is all of them
GHOSTS = "ghost router"  # absent where there is none
# Training changes a weight file all over, so a few pieces tell a fine-tune of equal shape and time (unpacked
# from an archive, say) from its base, at a cost that does not grow with the file.
SAMPLE_BYTES = 64 << 10
SAMPLES = 8


def identify(
    model_dir: Path, recipe: Recipe, kept: ExpertMask | None = None, ghosts: Path | None = None
) -> dict[str, Any]:
    """The identity as plain JSON; of some of the experts, if ``kept`` is given; with the weight file
    ``ghosts`` beside the checkpoint's. Raises OSError, CheckpointError.
    """
    return {
        **({} if kept is None else {EXPERTS: kept.digest}),
        **({} if ghosts is None else {GHOSTS: _weight_file(ghosts)}),
        "version of the conversion": CONVERSION_VERSION,
        "version of the rounding": ROUNDING_VERSION,
        "recipe": recipe.describe(),
        "config.json": hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest(),
        WEIGHT_FILES: [_weight_file(path) for path in list_weight_files(model_dir)],
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Where ``new`` first differs from ``old``, in words; None when it does not."""
    for what in (*new, *(old.keys() - new.keys())):
        if what in old and what in new and old[what] == new[what]:
            continue
        if what == WEIGHT_FILES and what in old:
            return _file_difference(old[what], new[what])
        return f"{what} differs"
    return None


def _weight_file(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        header = read_header_bytes(file, path.name)
        start = 8 + len(header)
        samples = hashlib.sha256()
        last = max(start, status.st_size - SAMPLE_BYTES)
        for number in range(SAMPLES):
            place = start + (last - start) * number // (SAMPLES - 1)
            samples.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    return {
        "name": path.name,
        "size": status.st_size,
        "time": status.st_mtime_ns,
        "header": hashlib.sha256(header).hexdigest(),
        "samples": samples.hexdigest(),
    }


def _file_difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    before, after = ({file["name"]: file for file in files} for files in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        was, now = before[name], after[name]
        if was["size"] != now["size"]:
            return f"{name} had {was['size']} bytes, now {now['size']}"
        if was["time"] != now["time"]:
            return f"{name} was of {_moment(was['time'])}, now of {_moment(now['time'])}"
        if was != now:
            return f"{name} has other contents, of the same size and time"
    return f"{WEIGHT_FILES} differ"


def _moment(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
