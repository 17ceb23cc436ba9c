"""Writes safetensors files out of byte ranges of others, a few megabytes at a time, hashing as it goes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from moe_runtime.checkpoint import open_regular, read_header_bytes
from moe_runtime.errors import CheckpointError
from moe_runtime.experts.cut import Piece
from moe_runtime.hf_config import parse_json

CHUNK_BYTES = 4 << 20
ALIGNMENT = 8  # of a header's length, as the safetensors library makes it
Told = Callable[[int], None]


def write_pieces(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], told: Told) -> str:
    """A new safetensors file of these tensors, in their order, synced to the disk; the SHA-256 of it.

    ``told`` is called with the number of bytes after each chunk. Memory: one chunk. Raises OSError,
    CheckpointError when a source has changed.
    """
    return write_file(path, _contents(pieces, metadata), told)


def copy_file(source: Path, path: Path, told: Told) -> str:
    """As ``write_pieces``, of a whole file of any kind."""
    with open_regular(source) as file:
        return write_file(path, iter(lambda: file.read(CHUNK_BYTES), b""), told)


def write_file(path: Path, chunks: Iterator[bytes], told: Told) -> str:
    """As ``write_pieces``, of given contents."""
    digest = hashlib.sha256()
    with FileIO(path, "x") as file:
        for chunk in chunks:
            digest.update(chunk)
            write_all(file, chunk)
            told(len(chunk))
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_all(file: FileIO, chunk: bytes) -> None:
    """Raises OSError when the disk is full."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def read_metadata(path: Path) -> dict[str, str]:
    """What a weight file says of itself: ``{"format": "pt"}``, mostly."""
    with open_regular(path) as file:
        header = parse_json(read_header_bytes(file, path.name))
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return dict(found) if isinstance(found, dict) else {"format": "pt"}


def _contents(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> Iterator[bytes]:
    yield _header(pieces, metadata)
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for piece in pieces:
            path = piece.source.path
            if path not in files:
                files[path] = stack.enter_context(open_regular(path))
            for start, num_bytes in piece.ranges:
                yield from _read(files[path], start, num_bytes, path.name)


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> bytes:
    """A file's first bytes: the length of the table, and the table."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.num_bytes
        table[piece.name] = {
            "dtype": piece.source.dtype,
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read(file: BinaryIO, start: int, num_bytes: int, name: str) -> Iterator[bytes]:
    while num_bytes:
        chunk = os.pread(file.fileno(), min(CHUNK_BYTES, num_bytes), start)
        if not chunk:
            raise CheckpointError("the file became shorter while it was read", file=name)
        yield chunk
        start, num_bytes = start + len(chunk), num_bytes - len(chunk)
