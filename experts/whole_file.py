"""A file that is there whole or not at all: written beside its name, synced, then renamed over it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_runtime.errors import PlanError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it gets the name ``path`` when the block ends, and is gone when the block raises.

    What was there before stays as it is until then. Raises PlanError when the disk refuses (full, read-only,
    no such folder).
    """
    try:
        with _temporary(path) as file:
            yield file
    except OSError as error:
        reason = error.strerror or str(error)
        raise PlanError(f"{path.name} cannot be written to {path.parent.name or '.'}: {reason}") from error


@contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    # Opened by hand: tempfile's files are private, the finished one has the rights of any other.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was named in it last survives a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
