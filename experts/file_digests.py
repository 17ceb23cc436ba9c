"""SHA-256 of whole files, remembered: within a process always, between processes where that is asked for.

A version of a file is its real path, size, inode and device, and both of its times. Programs can set the time
of the last change of its contents back, that of the last change of anything (ctime) is the system's own: a
changed byte under an old date is another version. Digests are remembered to be fast, never to be trusted
further than that; whoever certifies reads the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint import open_regular
from moe_runtime.errors import CheckpointError
from moe_runtime.packed_file import TABLE_ERRORS, PackedFileError, open_owned
from moe_runtime.packed_folder import NewFile, open_folder, packed_path, remove_leftovers

READERS = 8  # files hashed side by side
BLOCK_BYTES = 1 << 20
FORMAT = 1
NAME = "weights.sha256.json"
MAX_MEMO_BYTES = 16 << 20
# A file that changed so recently may change again within the same tick of the clock that times are taken
# from (some file systems: 2 seconds), and nobody would notice. As in git's index.
SETTLED_NS = 2 * 10**9
logger = logging.getLogger("moe_runtime.experts")


@dataclass(frozen=True, slots=True)
class FileVersion:
    """One content of a file. Times in nanoseconds since 1970."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """Raises OSError."""
        real = path.resolve()
        found = real.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        return cls(os.fspath(real), found.st_size, *times, found.st_ino, found.st_dev)


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Hexadecimal, of each file. Reads every byte, once per process and version. Raises CheckpointError."""
    return [digest for _, digest in _read_all(paths)]


class DigestMemo:
    """Digests of a model's weight files, kept in a small file for the next process.

    It lies beside the packed weights, under the same rules: another user's file or folder, or one that
    others can write to, is not used; it is written whole or not at all.
    """

    def __init__(self, model_dir: Path, folder: Path | None = None, *, verify: bool = False) -> None:
        """``folder``: as PackedStore's, None is beside the model. ``verify``: what the file says does not
        count, it is written anew.
        """
        self.path = packed_path(model_dir, folder, NAME)
        self._verify = verify
        self._links = folder is not None

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """As ``file_digests``; of versions that are known nothing is read. What this took is logged."""
        known = self._read()
        began = time.time_ns()
        now = [_version_of(path) for path in paths]
        unknown = [path for path, version in zip(paths, now, strict=True) if version not in known]
        if not unknown:
            return [known[version] for version in now]
        start = time.perf_counter()
        new = dict(zip(unknown, _read_all(unknown), strict=True))
        took = f"{_gigabytes(version for version, _ in new.values())} in {time.perf_counter() - start:.1f} s"
        found = [
            new[path] if path in new else (version, known[version])
            for path, version in zip(paths, now, strict=True)
        ]
        self._write(dict(found), took, began)
        return [digest for _, digest in found]

    def _read(self) -> dict[FileVersion, str]:
        if self._verify:
            return {}
        try:
            with open_folder(self.path.parent, links=self._links) as folder:
                descriptor, size = open_owned(self.path.name, folder)
            with open(descriptor, "rb") as file:
                if size > MAX_MEMO_BYTES:
                    raise PackedFileError(f"it has {size} bytes, at most {MAX_MEMO_BYTES} are read")
                return _parse(json.loads(file.read()))
        except FileNotFoundError:
            return {}
        except (OSError, PackedFileError, *TABLE_ERRORS) as error:
            logger.warning("%s is not used, the weight files are hashed again: %s", self.path, error)
            return {}

    def _write(self, digests: dict[FileVersion, str], took: str, began: int) -> None:
        """``began``: before the first version was looked at. Hashing may take longer than files need to
        settle: one that was new then can have changed since without another time.
        """
        settled = began - SETTLED_NS
        rows = [
            {**asdict(version), "sha256": digest}
            for version, digest in digests.items()
            if max(version.ctime_ns, version.mtime_ns) < settled
        ]
        text = json.dumps({"format": FORMAT, "files": rows}, indent=1) + "\n"
        try:
            with open_folder(self.path.parent, links=self._links, make=True) as folder:
                remove_leftovers(folder, self.path.name)
                with closing(NewFile(folder, self.path.name)) as file:
                    with open(file.descriptor, "wb", closefd=False) as stream:
                        stream.write(text.encode())
                    os.fsync(file.descriptor)
                    file.publish()
        except (OSError, PackedFileError) as error:
            logger.warning(
                "weight files hashed (%s); the next start hashes them again, since the digests cannot be "
                "remembered: %s. --packed-dir names a folder for them",
                took,
                error,
            )
            return
        left = len(digests) - len(rows)
        but = f", {left} files not, which have just been changed" if left else ""
        logger.info("weight files hashed (%s); remembered in %s%s", took, self.path, but)


def _parse(value: Any) -> dict[FileVersion, str]:
    """Raises one of TABLE_ERRORS for what is no memo of this version."""
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']!r}, this version reads {FORMAT}")
    known = {}
    for row in value["files"]:
        digest = row.pop("sha256")
        if not isinstance(digest, str) or len(digest) != 64:
            raise ValueError("a digest is not 64 characters long")
        known[FileVersion(**row)] = digest
    return known


def _read_all(paths: Sequence[Path]) -> list[tuple[FileVersion, str]]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="moe-digest") as pool:
        return list(pool.map(_digest_of, paths))


def _digest_of(path: Path) -> tuple[FileVersion, str]:
    """Raises CheckpointError, also for a file that changes meanwhile."""
    version = _version_of(path)
    try:
        digest = _read(version)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path.name) from error
    if _version_of(path) != version:
        raise CheckpointError("was changed while it was read; start again", file=path.name)
    return version, digest


def _version_of(path: Path) -> FileVersion:
    try:
        return FileVersion.of(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path.name) from error


@lru_cache(maxsize=4096)
def _read(version: FileVersion) -> str:
    with open_regular(Path(version.path)) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        found = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _gigabytes(versions: Any) -> str:
    return f"{sum(version.size for version in versions) / 1e9:.2f} GB"
