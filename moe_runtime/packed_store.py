"""Keeps packed weights between starts: beside the model, or in a folder of the user's choice.

A file is used when it was made from this very checkpoint with this recipe, conversion (packed_identity.py)
and layout, when nobody but us or root could have written it, and when its checksums hold. Otherwise the log
says why, and a new one takes its place. Without a place to write, weights stay in memory.

Beside it lies, under the same conditions, a small JSON file: what quantising was found to cost.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError
from moe_runtime.layers.decoder import Decoder
from moe_runtime.packed_file import (
    TABLE_ERRORS,
    Array,
    PackedFile,
    PackedFileError,
    file_size,
    open_file,
    open_owned,
    write,
)
from moe_runtime.packed_folder import NewFile, check_space, open_folder, packed_path, remove_leftovers
from moe_runtime.packed_identity import difference, identify
from moe_runtime.packed_model import save
from moe_runtime.plan import ExpertMask
from moe_runtime.quant.recipe import Recipe

MAX_FINDING_BYTES = 16 << 20
UNFIT = (OSError, PackedFileError, CheckpointError)
logger = logging.getLogger("moe_runtime.packed")


@dataclass
class PackedStore:
    """One model folder's packed weights by one recipe. ``folder`` None is beside the model; ``verify`` reads
    the whole file at each start and compares all checksums, else only those of its table. With ``kept``, the
    file of these experts alone: what is not among them is not even mapped. ``ghosts`` is a weight file beside
    the checkpoint's that the model is also made from.

    ``open`` comes first, before anything of the checkpoint is read: what it finds there is the identity that
    the others go by, so that a checkpoint replaced meanwhile is not taken for the one that was read.
    """

    model_dir: Path
    recipe: Recipe
    folder: Path | None = None
    verify: bool = True
    kept: ExpertMask | None = None
    ghosts: Path | None = None
    _identity: dict[str, Any] | None = field(default=None, init=False)
    _writer: threading.Thread | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        name = f"{self.recipe.label}{'' if self.kept is None else f'_some-{self.kept.digest[:8]}'}.moe"
        return packed_path(self.model_dir, self.folder, name)

    @property
    def finding_path(self) -> Path:
        return self.path.with_suffix(".json")

    def open(self) -> PackedFile | None:
        """The file, mapped and checked, or None: then there is none, or the log says what is wrong with
        it.
        """
        start = time.perf_counter()
        self._identity = None
        try:
            self._identity = identity = self._identify()
            with self._open_folder() as folder:
                file = open_file(
                    self.path.name, lambda found: _compare(found, identity), verify=self.verify, folder=folder
                )
        except FileNotFoundError:
            return None
        except (PackedFileError, OSError) as error:
            self.refuse(error)
            return None
        except CheckpointError:
            return None  # reading the checkpoint will say what is wrong with it
        gigabytes, seconds = file.num_bytes / 1e9, time.perf_counter() - start
        logger.info("weights mapped from %s (%.2f GB, checked in %.2f s)", self.path, gigabytes, seconds)
        return file

    def refuse(self, error: Exception) -> None:
        """Say why the file is not used."""
        logger.warning("%s is not used: %s. Packing the weights anew", self.path, error)

    def save(self, model: Decoder) -> None:
        """Start writing the file in the background, if there is a place for it."""
        arrays, values = save(model)
        try:
            self._check_unchanged()
            with self._open_folder(make=True) as folder:
                remove_leftovers(folder, self.path.name)
                check_space(folder, self.path.parent, file_size(arrays))
                file = NewFile(folder, self.path.name)
        except UNFIT as error:
            _keep_in_memory(error)
            return
        # Not a daemon: a process that ends early finishes its file first.
        writer = threading.Thread(target=self._write, name="moe-packed-writer", args=(file, arrays, values))
        try:
            writer.start()
        except RuntimeError as error:  # the system has no more threads
            file.close()
            _keep_in_memory(error)
        else:
            self._writer = writer

    def wait(self) -> None:
        """Until a file that is being written is complete."""
        if self._writer is not None:
            self._writer.join()

    def read_finding(self) -> Any:
        """What ``keep_finding`` kept of the checkpoint and the recipe that ``open`` found; else None."""
        if self._identity is None:
            return None
        try:
            with self._open_folder() as folder:
                descriptor, size = open_owned(self.finding_path.name, folder)
            with open(descriptor, "rb") as file:
                if size > MAX_FINDING_BYTES:
                    raise PackedFileError(f"it has {size} bytes, at most {MAX_FINDING_BYTES} are read")
                kept = json.loads(file.read())
            _compare(kept["identity"], self._identity)
            return kept["finding"]
        except FileNotFoundError:
            return None
        except (OSError, PackedFileError, *TABLE_ERRORS) as error:
            logger.warning("%s is not used, measuring again: %s", self.finding_path, error)
            return None

    def keep_finding(self, finding: Any) -> None:
        """For the next start's ``read_finding``; plain JSON."""
        path = self.finding_path
        try:
            self._check_unchanged()
            with self._open_folder(make=True) as folder:
                remove_leftovers(folder, path.name)
                with closing(NewFile(folder, path.name)) as file:
                    text = json.dumps({"identity": self._identity, "finding": finding}, indent=1) + "\n"
                    with open(file.descriptor, "wb", closefd=False) as stream:
                        stream.write(text.encode())
                    os.fsync(file.descriptor)
                    file.publish()
        except UNFIT as error:
            logger.warning("%s is not written, the next start measures again: %s", path, error)

    def _write(self, file: NewFile, arrays: Mapping[str, Array], values: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        with closing(file):
            try:
                size = write(file.descriptor, arrays, self._identity, values)
                self._check_unchanged()
                file.publish()
            except Exception as error:  # noqa: BLE001 (whatever it is: a thread that it ends tells nobody)
                _keep_in_memory(error)
                return
            seconds = time.perf_counter() - start
            logger.info("packed weights written to %s (%.2f GB in %.1f s)", self.path, size / 1e9, seconds)
            try:
                file.sync_name()
            except OSError as error:
                logger.warning("a power cut may lose %s, its folder cannot be synced: %s", self.path, error)

    def _identify(self) -> dict[str, Any]:
        return identify(self.model_dir, self.recipe, self.kept, self.ghosts)

    def _open_folder(self, *, make: bool = False) -> AbstractContextManager[int]:
        # Who names a folder means it, wherever a link leads. The one beside the model must be just there.
        return open_folder(self.path.parent, links=self.folder is not None, make=make)

    def _check_unchanged(self) -> None:
        """Raises CheckpointError unless the checkpoint is still the one that ``open`` found."""
        if self._identity is None:
            raise CheckpointError("the checkpoint could not be identified before it was read")
        try:
            different = difference(self._identity, self._identify())
        except OSError as error:
            different = str(error)
        if different is not None:
            raise CheckpointError(
                f"the checkpoint was changed while its weights were read or packed: {different}"
            )


def _compare(found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    different = difference(found, identity)
    if different is not None:
        raise PackedFileError(f"it is stale: {different}")


def _keep_in_memory(error: Exception) -> None:
    if isinstance(error, CheckpointError):
        remedy = "This process may hold a mixture; start again when the checkpoint is complete"
    else:
        remedy = "--packed-dir names another folder, --no-packed-file stops trying"
    logger.warning(
        "the packed weights are in memory only, the next start packs again: %s. %s",
        error,
        remedy,
        exc_info=None if isinstance(error, UNFIT) else error,
    )
