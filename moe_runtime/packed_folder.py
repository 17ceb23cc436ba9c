"""The folder of packed weights: nobody else can have written what is found there, and a file comes into it
whole or not at all.
"""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_runtime.packed_file import PackedFileError, check_owner

FOLDER = ".moe_packed"  # in the model folder
SPARE_BYTES = 256 << 20  # left free on the disk
ATTEMPTS = 10


def packed_path(model_dir: Path, folder: Path | None, name: str) -> Path:
    """Where the file ``name`` of a model goes: beside the model, or into a ``folder`` that models share."""
    if folder is None:
        return model_dir / FOLDER / name
    home = model_dir.resolve()
    place = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    return folder / f"{home.name}-{place}-{name}"


@contextmanager
def open_folder(path: Path, *, links: bool, make: bool = False, mode: int = 0o755) -> Iterator[int]:
    """A descriptor of the folder, made with ``mode``. Raises OSError, PackedFileError when others can write
    to it, or when it is a link and ``links`` does not allow that.

    Where others can write to the model folder, they can put another folder, or a link to one, in this one's
    place at any moment. So its owner and mode are asked of the descriptor, and whatever is opened, renamed or
    removed in it goes through the descriptor too, never through the path.
    """
    if make:
        with suppress(FileExistsError):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if not links and error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
            raise PackedFileError(
                f"the folder {path} is a symbolic link; use --packed-dir for another place"
            ) from error
        raise
    try:
        check_owner(os.fstat(descriptor), f"the folder {path}")
        yield descriptor
    finally:
        os.close(descriptor)


class NewFile:
    """A file under a temporary name. ``publish`` gives it its own, ``close`` without that removes it.

    It is locked as long as we live: see ``remove_leftovers``. Raises PackedFileError, and OSError, also where
    the file system has no locks.
    """

    def __init__(self, folder: int, name: str) -> None:
        self.name = name
        self._folder = os.dup(folder)
        try:
            self.descriptor, self._temporary = _create(folder, name)
        except BaseException:
            os.close(self._folder)
            raise

    def publish(self) -> None:
        """In place of what had the name before. Raises OSError."""
        os.rename(self._temporary, self.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._temporary = ""

    def sync_name(self) -> None:
        """After ``publish``: until then a power cut may bring the old file back. Raises OSError."""
        os.fsync(self._folder)

    def close(self) -> None:
        if self._temporary:
            _remove(self._temporary, self._folder)
        os.close(self.descriptor)
        os.close(self._folder)


def _create(folder: int, name: str) -> tuple[int, str]:
    """An empty, locked file: its descriptor and its temporary name."""
    for _ in range(ATTEMPTS):
        temporary = f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o644, dir_fd=folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before we had the lock, another process may have taken the file for a leftover.
            is_ours = os.fstat(descriptor).st_nlink == 1
        except BlockingIOError:
            is_ours = False  # it is just doing so
        except OSError:
            _remove(temporary, folder)
            os.close(descriptor)
            raise
        if is_ours:
            return descriptor, temporary
        _remove(temporary, folder)
        os.close(descriptor)
    raise PackedFileError(f"{ATTEMPTS} temporary files were each taken for a leftover by another process")


def remove_leftovers(folder: int, name: str) -> None:
    """Unfinished files of processes that are gone: those that live hold a lock."""
    for leftover in os.listdir(folder):
        if not (leftover.startswith(f".{name}.") and leftover.endswith(".tmp")):
            continue
        with suppress(OSError):
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(leftover, flags, dir_fd=folder)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(leftover, dir_fd=folder)
            finally:
                os.close(descriptor)


def check_space(folder: int, path: Path, num_bytes: int) -> None:
    """Raises PackedFileError unless a file of ``num_bytes`` leaves SPARE_BYTES free in the folder."""
    disk = os.fstatvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < num_bytes + SPARE_BYTES:
        raise PackedFileError(
            f"{path} has {free / 1e9:.1f} GB free, {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB are needed"
        )


def _remove(name: str, folder: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)
