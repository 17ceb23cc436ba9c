"""One file of packed weights: written once, checked, and mapped by every later start. Knows no models.

    64 bytes   magic, versions of the file and of csrc/layout.h, the table's place, its checksum, that of
    these arrays     each at a multiple of 64 bytes, of 2 MiB if it is as large, so that it can lie on huge
    pages table      JSON: what the file was made from, the caller's values, and each array's place and
    checksums

Numbers are little-endian, the bytes of an array those the kernels read, on any instruction set. Whatever is
wrong with a file is a PackedFileError that says so; the caller makes a new one.
"""

import errno
import json
import mmap
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moe_runtime._C as _C
from moe_runtime.errors import KernelError

FILE_VERSION = 1
MAGIC = b"MOEPACK\n"
PREAMBLE = struct.Struct("<8sIIQQQ16xQ")
HUGE_PAGE = 2 << 20
# What reading a table that another version of this program wrote can end in.
TABLE_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, KernelError,
)  # fmt: skip
LINE = 64
BLOCK_BYTES = 16 << 20  # bytes under one checksum, where the caller wants no other
WRITE_BYTES = 16 << 20
MAX_TABLE_BYTES = 256 << 20
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.uint8, torch.float32, torch.bfloat16, torch.float16,
)}  # fmt: skip


class PackedFileError(Exception):
    """For example a file that was cut short. Never leaves the loader: the weights are packed again."""


@dataclass(frozen=True)
class Array:
    """A contiguous tensor to write; a checksum for every ``block_bytes`` of it."""

    tensor: torch.Tensor
    block_bytes: int = BLOCK_BYTES

    @property
    def num_bytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())


@dataclass(frozen=True)
class PackedFile:
    """An open file: the ``values`` and the ``arrays`` (views of the mapping, read-only) that were written."""

    values: Mapping[str, Any]
    arrays: Mapping[str, torch.Tensor]
    num_bytes: int


def table_error(error: Exception) -> PackedFileError:
    """For one of TABLE_ERRORS."""
    return PackedFileError(f"its table does not fit this program: {type(error).__name__}: {error}")


# --- writing ------------------------------------------------------------------------------------------------


def file_size(arrays: Mapping[str, Array]) -> int:
    """Bytes of a file of ``arrays``, without its table."""
    end = PREAMBLE.size
    for array in arrays.values():
        end = _place(end, array.num_bytes) + array.num_bytes
    return end


def write(descriptor: int, arrays: Mapping[str, Array], identity: object, values: Mapping[str, Any]) -> int:
    """Write the file into an empty ``descriptor`` and sync it; its size in bytes. Raises OSError."""
    end, table_arrays = PREAMBLE.size, {}
    for name, array in arrays.items():
        start = _place(end, array.num_bytes)
        address, checksums = array.tensor.data_ptr(), []
        for offset, count in _blocks(array.num_bytes, array.block_bytes):
            checksums.append(_C.checksum(address + offset, count))
        _write_all(descriptor, _bytes_of(array.tensor), start)
        table_arrays[name] = {
            "dtype": str(array.tensor.dtype).removeprefix("torch."),
            "shape": list(array.tensor.shape),
            "offset": start,
            "block_bytes": array.block_bytes,
            "checksums": checksums,
        }
        end = start + array.num_bytes
    table = json.dumps({"identity": identity, "values": values, "arrays": table_arrays}).encode()
    _write_all(descriptor, memoryview(table), end)
    head = PREAMBLE.pack(MAGIC, FILE_VERSION, _C.LAYOUT_VERSION, end, len(table), _checksum(table), 0)
    # Last: a file without its first bytes is no packed file.
    _write_all(descriptor, memoryview(head[:-8] + struct.pack("<Q", _checksum(head[:-8]))), 0)
    os.fsync(descriptor)
    return end + len(table)


def _place(end: int, num_bytes: int) -> int:
    alignment = HUGE_PAGE if num_bytes >= HUGE_PAGE else LINE
    return -(-end // alignment) * alignment


def _blocks(num_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, num_bytes, block_bytes):
        yield offset, min(block_bytes, num_bytes - offset)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _checksum(data: bytes) -> int:
    copy = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return int(_C.checksum(copy.data_ptr(), len(data)))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        # Large pieces: the file system then keeps them in large pages.
        count = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[count:], offset + count


# --- reading ------------------------------------------------------------------------------------------------


def open_file(
    path: str | Path, check_identity: Callable[[Any], None], *, verify: bool, folder: int | None = None
) -> PackedFile:
    """Map a file after checking owner, size, versions, table, and with ``verify`` every checksum.

    ``path`` may be relative to an open ``folder``. ``check_identity`` raises PackedFileError for what the
    file was made from. Raises PackedFileError, and FileNotFoundError where there is none.
    """
    descriptor, size = open_owned(path, folder)
    try:
        table = _read_table(descriptor, size)
        check_identity(table["identity"])
        if verify:
            _verify(descriptor, table["arrays"])
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        with suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        arrays = {name: _view(mapped, entry) for name, entry in table["arrays"].items()}
        return PackedFile(dict(table["values"]), arrays, size)
    except OSError as error:
        raise PackedFileError(f"cannot be read: {error}") from error
    except TABLE_ERRORS as error:
        raise table_error(error) from error
    finally:
        os.close(descriptor)


def open_owned(path: str | Path, folder: int | None = None) -> tuple[int, int]:
    """Descriptor and size of a file that nobody but us or root could have written; ``path`` may be relative
    to an open ``folder``. Raises PackedFileError, and FileNotFoundError where there is none.
    """
    try:
        # Non-blocking: opening a pipe that lies in the file's place would wait for its writer forever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PackedFileError("it is a symbolic link; use --packed-dir for another place") from error
        raise PackedFileError(f"cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PackedFileError("not a regular file")
        check_owner(status, "the file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def check_owner(status: os.stat_result, what: str) -> None:
    """Refuse what another user could have written. Raises PackedFileError."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PackedFileError(f"{what} belongs to user {status.st_uid}, not to us ({os.geteuid()}) or root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PackedFileError(f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):o})")


def _read_table(descriptor: int, size: int) -> dict[str, Any]:
    head = os.pread(descriptor, PREAMBLE.size, 0)
    if len(head) < PREAMBLE.size or not head.startswith(MAGIC):
        raise PackedFileError("not a packed file, or cut short")
    _, file_version, layout_version, start, length, table_checksum, checksum = PREAMBLE.unpack(head)
    if (file_version, layout_version) != (FILE_VERSION, _C.LAYOUT_VERSION):
        raise PackedFileError(
            f"version {file_version} with layout {layout_version}; "
            f"this program reads {FILE_VERSION} with {_C.LAYOUT_VERSION}"
        )
    if checksum != _checksum(head[:-8]):
        raise PackedFileError("its first bytes are damaged")
    if start + length != size or length > MAX_TABLE_BYTES:
        raise PackedFileError(f"it should have {start + length} bytes and has {size}: cut short")
    table = os.pread(descriptor, length, start)
    if len(table) != length or _checksum(table) != table_checksum:
        raise PackedFileError("its table is damaged")
    parsed = json.loads(table)
    for name, entry in parsed["arrays"].items():
        entry["num_bytes"] = num_bytes = _num_bytes(entry)
        blocks = -(-num_bytes // entry["block_bytes"])
        if not PREAMBLE.size <= entry["offset"] <= start - num_bytes or len(entry["checksums"]) != blocks:
            raise PackedFileError(f"{name} lies outside the file")
    return dict(parsed)


def _num_bytes(entry: Mapping[str, Any]) -> int:
    return int(torch.Size(entry["shape"]).numel() * DTYPES[entry["dtype"]].itemsize)


def _verify(descriptor: int, entries: Mapping[str, Any]) -> None:
    jobs = []
    for name, entry in entries.items():
        blocks = _blocks(entry["num_bytes"], entry["block_bytes"])
        for (offset, count), checksum in zip(blocks, entry["checksums"], strict=True):
            jobs.append((name, entry["offset"] + offset, count, checksum))

    def check(job: tuple[str, int, int, int]) -> None:
        name, offset, count, checksum = job
        try:
            found = _C.checksum_file(descriptor, offset, count)
        except KernelError as error:  # the disk, or somebody cutting the file meanwhile
            raise PackedFileError(f"{name} cannot be read: {error}") from error
        if found != checksum:
            raise PackedFileError(f"{name} is damaged (bytes {offset} to {offset + count})")

    with ThreadPoolExecutor(_C.num_threads()) as pool:
        for _ in pool.map(check, jobs):
            pass


def _view(mapped: mmap.mmap, entry: Mapping[str, Any]) -> torch.Tensor:
    if not entry["num_bytes"]:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nobody writes to weights.
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry["num_bytes"], offset=entry["offset"])
    return raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
