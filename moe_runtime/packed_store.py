"""Keeps packed weights between starts: beside the model, or in a folder of the user's choice.

A file is used when it was made from this very checkpoint (config, and each weight file's name, size, time and
header) with this recipe and layout, when nobody but us or root could have written it, and when its checksums
hold. Otherwise the log says why, and a new one takes its place. Without a place to write, weights stay in
memory.
"""

import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint import list_weight_files, read_header_bytes
from moe_runtime.errors import CheckpointError
from moe_runtime.layers.decoder import Decoder
from moe_runtime.packed_file import (
    Array,
    PackedFile,
    PackedFileError,
    check_owner,
    file_size,
    open_file,
    write,
)
from moe_runtime.packed_model import save
from moe_runtime.quant.recipe import Recipe
from moe_runtime.quant.rounding import ROUNDING_VERSION

FOLDER = ".moe_packed"
SPARE_BYTES = 256 << 20  # left free on the disk
logger = logging.getLogger("moe_runtime.packed")


@dataclass
class PackedStore:
    """One model folder's packed weights by one recipe. ``folder`` None is beside the model; ``verify`` reads
    the whole file at each start and compares all checksums, else only those of its table.
    """

    model_dir: Path
    recipe: Recipe
    folder: Path | None = None
    verify: bool = True
    _writer: threading.Thread | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        if self.folder is None:
            return self.model_dir / FOLDER / f"{self.recipe.label}.moe"
        home = self.model_dir.resolve()
        place = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
        return self.folder / f"{home.name}-{place}-{self.recipe.label}.moe"

    def open(self) -> PackedFile | None:
        """The file, mapped and checked, or None: then there is none, or the log says what is wrong with
        it.
        """
        start = time.perf_counter()
        try:
            identity = self._identity()
            check_owner(self.path.parent.stat(), f"the folder {self.path.parent}")
            file = open_file(self.path, lambda found: _compare(found, identity), verify=self.verify)
        except FileNotFoundError:
            return None
        except (PackedFileError, OSError) as error:
            self.refuse(error)
            return None
        except CheckpointError:
            return None  # reading the checkpoint will say what is wrong with it
        size, seconds = self.path.stat().st_size, time.perf_counter() - start
        logger.info("weights mapped from %s (%.2f GB, checked in %.2f s)", self.path, size / 1e9, seconds)
        return file

    def refuse(self, error: Exception) -> None:
        """Say why the file is not used."""
        logger.warning("%s is not used: %s. Packing the weights anew", self.path, error)

    def save(self, model: Decoder, extra: Mapping[str, Any]) -> None:
        """Start writing the file in the background, if there is a place for it; ``extra`` joins its
        values.
        """
        arrays, values = save(model)
        try:
            identity = self._identity()
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_owner(self.path.parent.stat(), f"the folder {self.path.parent}")
            _remove_leftovers(self.path)
            _check_space(self.path.parent, file_size(arrays))
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o644)
        except (OSError, PackedFileError, CheckpointError) as error:
            _keep_in_memory(error)
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as we live: see _remove_leftovers
        # Not a daemon: a process that ends early finishes its file first.
        self._writer = threading.Thread(
            target=self._write,
            name="moe-packed-writer",
            args=(descriptor, temporary, arrays, identity, {**values, **extra}),
        )
        self._writer.start()

    def wait(self) -> None:
        """Until a file that is being written is complete."""
        if self._writer is not None:
            self._writer.join()

    def _write(
        self,
        descriptor: int,
        temporary: Path,
        arrays: Mapping[str, Array],
        identity: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> None:
        start = time.perf_counter()
        try:
            size = write(descriptor, arrays, identity, values)
            temporary.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _keep_in_memory(error)
        else:
            seconds = time.perf_counter() - start
            logger.info("packed weights written to %s (%.2f GB in %.1f s)", self.path, size / 1e9, seconds)
        finally:
            os.close(descriptor)

    def _identity(self) -> dict[str, Any]:
        """What the packed weights follow from. Contents of the weight files are not read: like ``make``, this
        trusts that a changed file has another time, size or header.
        """
        files = []
        for path in list_weight_files(self.model_dir):
            status = path.stat()
            header = hashlib.sha256(read_header_bytes(path)).hexdigest()
            files.append([path.name, status.st_size, status.st_mtime_ns, header])
        config = (self.model_dir / "config.json").read_bytes()
        return {
            "config.json": hashlib.sha256(config).hexdigest(),
            "weight files": files,
            "recipe": self.recipe.describe(),
            "rounding": ROUNDING_VERSION,
        }


def _compare(found: Any, identity: Mapping[str, Any]) -> None:
    for what, value in identity.items():
        if found.get(what) != value:
            raise PackedFileError(f"it is stale, made from another {what}")


def _check_space(folder: Path, num_bytes: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < num_bytes + SPARE_BYTES:
        raise PackedFileError(
            f"{folder} has {free / 1e9:.1f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB are needed"
        )


def _remove_leftovers(path: Path) -> None:
    """Unfinished files of processes that are gone: those that live hold a lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(descriptor)


def _keep_in_memory(error: Exception) -> None:
    logger.warning(
        "the packed weights are in memory only, the next start packs again: %s. "
        "--packed-dir names another folder, --no-packed-file stops trying",
        error,
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
