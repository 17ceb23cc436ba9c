"""A folder that is there whole or not at all: filled beside its name, synced, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_runtime.errors import PlanError
from moe_runtime.experts.whole_file import sync_folder


@contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder to fill; it gets the name ``target`` when the block ends, and is gone when the block
    raises. What a killed process left of it is removed by the next one.

    Raises PlanError when ``target`` exists or another process is writing it, and when the disk refuses:
    before the block if there is less room than ``num_bytes``, or when it is full.
    """
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial")
    try:
        _check_target(target)
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(descriptor, partial)
            try:
                _empty(partial)
                _check_room(partial, num_bytes)
                yield partial
                for path in (*(item for item in partial.rglob("*") if item.is_dir()), partial):
                    sync_folder(path)
                _check_target(target)
                os.rename(partial, target)
            except BaseException:
                # What cannot be removed now is no model: whoever fills it writes config.json last.
                shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            os.close(descriptor)
        sync_folder(target.parent)
    except BlockingIOError as error:
        raise PlanError(f"another process is writing {target.name}; wait for it to end") from error
    except OSError as error:
        where = target.parent.name or "."
        raise PlanError(f"{target.name} cannot be written to {where}: {error.strerror or error}") from error


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise PlanError(f"{target.name} exists already; nothing is written over it: choose another --out")
    if not target.parent.is_dir():
        raise PlanError(f"there is no folder {target.parent.name or '.'} to put {target.name} into")


def _lock(descriptor: int, partial: Path) -> None:
    """Ours until the descriptor is closed. Raises BlockingIOError for another's."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Between opening and locking, its owner may have finished: then the name is another folder's, or free.
    if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
        raise BlockingIOError


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise PlanError(f"the disk has {free / 1e9:.2f} GB free, {num_bytes / 1e9:.2f} GB are needed")
