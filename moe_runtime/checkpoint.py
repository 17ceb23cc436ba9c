"""Safetensors files as a table of tensors, each a view of the mapped file. Trusts nothing it reads.

Every header is checked twice: by the safetensors library, and here, where duplicate keys (which the
library lets the last win), overlaps, holes and names that look like paths are refused too. Names are never
used as paths. Knows nothing of models.
"""

import mmap
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from moe_runtime.errors import CheckpointError
from moe_runtime.hf_config import parse_json, read_json

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
FAULT_AROUND = 2 * 1024 * 1024  # bytes the kernel may map around a touched page of a cached file
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARDS_FILE = "expert_shards.json"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,299}")
STRAY_FILE = re.compile(r"(model-\d{5}-of-\d{5}|adapter_model)\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``start`` bytes into ``path``, row-major."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Checkpoint:
    """The tensors of a model folder. Opening reads and checks all headers, no weights.

    ``sparse``, set before the first ``read``: the tensors that are read lie among many that are not, so the
    system must not read ahead from one into the next.
    ``left_out``: names, without their last part, of tensors in shards of experts that are not in the folder,
    and the file of each.
    """

    def __init__(self, folder: Path) -> None:
        self.sparse = False
        self.entries: dict[str, TensorEntry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        files, index = _list_files(folder)
        for path in files:
            for entry in read_header(path):
                other = self.entries.setdefault(entry.name, entry)
                if other is not entry:
                    raise CheckpointError(f"also in {other.path.name}", file=path.name, tensor=entry.name)
        here = {path.name for path in files}
        self.left_out: dict[str, str] = {}
        if index is not None:
            gone = {name: file for name, file in index.items() if file not in here}
            self.left_out = {name.rpartition(".")[0]: file for name, file in gone.items()}
            self._compare_with_index({name: file for name, file in index.items() if file in here})

    def _compare_with_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            if name not in self.entries:
                raise CheckpointError(f"named by {INDEX_FILE}, but not in the file", file=file, tensor=name)
            if self.entries[name].path.name != file:
                where = self.entries[name].path.name
                raise CheckpointError(f"{INDEX_FILE} says it is in {file}", file=where, tensor=name)
        for name, entry in self.entries.items():
            if name not in index:
                raise CheckpointError(f"not named by {INDEX_FILE}", file=entry.path.name, tensor=name)

    def common_dtype(self) -> str | None:
        """The float dtype with the most bytes, for configs that name none."""
        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "bfloat16"}
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.dtype in names:
                sizes[names[entry.dtype]] += entry.num_bytes
        return max(sizes, key=lambda name: sizes[name], default=None)

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """A view of the mapped file in the stored dtype and shape; valid as long as anybody holds it."""
        mapped = self._map(entry.path)
        if self.sparse:
            first = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, first, entry.start + entry.num_bytes - first)
        dtype = DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:  # legal, if unusual
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.num_bytes, offset=entry.start)
            return raw.clone().view(dtype).view(entry.shape)
        count = entry.num_bytes // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            mapped = self._maps.get(path)
            if mapped is None:
                with open_regular(path) as file:
                    # Copy-on-write, which torch wants and nobody uses: private pages are only made by
                    # writing.
                    mapped = self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                mapped.madvise(mmap.MADV_RANDOM if self.sparse else mmap.MADV_SEQUENTIAL)
            return mapped

    def drop(self, entry: TensorEntry) -> None:
        """Give the pages of a tensor back to the system; reading it again would fetch them again."""
        mapped = self._maps.get(entry.path)
        if mapped is not None:
            # A fault also maps its neighbours, so the edges of this tensor's neighbours are here too.
            first = max(0, entry.start - FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            last = min(len(mapped), entry.start + entry.num_bytes + FAULT_AROUND)
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
})  # fmt: skip
ITEM_BYTES: Mapping[str, int] = MappingProxyType({
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
})  # fmt: skip


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model. Raises CheckpointError as Checkpoint does."""
    return _list_files(folder)[0]


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """``path`` for reading. Raises OSError, and CheckpointError for what is no file."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError("not a regular file", file=path.name)
        yield file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for its writer for ever


def read_header_bytes(file: BinaryIO, name: str) -> bytes:
    """The header of a safetensors file as it is, unchecked but for its size. Raises OSError,
    CheckpointError.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header of {length} bytes", file=name)
    return file.read(length)


def _list_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index (tensor name -> file name) when there is one."""
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("weight_map is missing or empty", file=INDEX_FILE)
        for name, file in weight_map.items():
            if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{str(file)[:80]!r} is not the name of a .safetensors file in this folder",
                    file=INDEX_FILE,
                    tensor=ascii(name[:80])[1:-1],
                )
        removable = _shard_files(folder)
        names = sorted(set(weight_map.values()))
        files = [folder / name for name in names if name not in removable or (folder / name).exists()]
        _refuse_strays(folder, files)
        return files, weight_map
    found = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE_FILE) in found:
        _refuse_strays(folder, [folder / SINGLE_FILE])
        return [folder / SINGLE_FILE], None
    if len(found) == 1:
        return found, None
    if found:
        raise CheckpointError(
            f"{len(found)} .safetensors files, but no {INDEX_FILE} says which belong", file=folder.name
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            "pickled weights can run code when loaded, so they are not read; convert them to .safetensors",
            file=pickles[0],
        )
    raise CheckpointError(f"no {SINGLE_FILE} and no {INDEX_FILE}", file=folder.name)


def _shard_files(folder: Path) -> set[str]:
    """Files of experts that may be missing: a model that `moe-experts shard` wrote runs without those that
    its scenarios do not use.
    """
    if not (folder / SHARDS_FILE).exists():
        return set()
    body: Any = read_json(folder / SHARDS_FILE).get("body")
    try:
        return {str(shard["file"]) for shard in body["shards"].values() if shard["experts"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a list of shards: {error}", file=SHARDS_FILE) from error


def _refuse_strays(folder: Path, files: list[Path]) -> None:
    """Weights by other names (another format's copy) are left alone; these look as if they belonged."""
    for path in sorted(folder.glob("*.safetensors")):
        if STRAY_FILE.fullmatch(path.name) and path not in files:
            raise CheckpointError(
                f"would not be used: the model is in {files[0].name}{' and others' if files[1:] else ''}. "
                "Shards need their index, adapters must be merged into the weights first; or remove the file",
                file=path.name,
            )


def read_header(path: Path) -> Iterator[TensorEntry]:
    """The tensors of one file, checked against each other and the file's size. Raises CheckpointError."""
    if path.exists() and not path.is_file():
        raise CheckpointError("not a regular file", file=path.name)  # the library would wait for a pipe
    try:
        with safe_open(path, framework="pt"):  # the library's own checks
            pass
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"header of {length} bytes in a file of {size}", file=path.name)
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"not a valid safetensors file: {error}", file=path.name) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is not an object", file=path.name)
    header.pop("__metadata__", None)
    entries = [_entry(path, 8 + length, name, fields) for name, fields in header.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != end:
            raise CheckpointError(
                "overlaps its neighbour or leaves a hole", file=path.name, tensor=entry.name
            )
        end += entry.num_bytes
    if end != size:
        raise CheckpointError(f"the header describes {end} bytes, the file has {size}", file=path.name)
    yield from entries


def _entry(path: Path, data_start: int, name: str, fields: object) -> TensorEntry:
    def refuse(message: str) -> CheckpointError:
        return CheckpointError(message, file=path.name, tensor=ascii(name[:80])[1:-1])

    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise refuse("not a tensor name")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(f"unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise refuse("shape is not a short list of counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("data_offsets is not [start, end]")
    num_bytes = ITEM_BYTES[dtype]
    for dimension in shape:
        num_bytes *= dimension
    if offsets[1] - offsets[0] != num_bytes:
        raise refuse(f"{dtype} {shape} takes {num_bytes} bytes, data_offsets give {offsets[1] - offsets[0]}")
    return TensorEntry(name, path, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
