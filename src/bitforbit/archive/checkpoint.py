"""Tensors of a checkpoint by name, whole or in part, read when they are asked for: safetensors' ``safe_open``."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from bitforbit import dtypes, tensors
from bitforbit.archive import indexing
from bitforbit.archive.indexing import Index
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.ranges import Range, Region, file_reader, read_plain
from bitforbit.archive.rewrite import load_object
from bitforbit.archive.shard_reader import ShardReader
from bitforbit.archive.source import df11_config, refuse_kind
from bitforbit.errors import (
    MissingDependencyError,
    MissingPartError,
    SourceNotFoundError,
    UnsupportedDtypeError,
    UsageError,
)
from bitforbit.format.header import Header, TensorEntry, read_header
from bitforbit.format.layout import is_shard, open_shard
from bitforbit.format.manifest import read_manifest
from bitforbit.format.spec import INDEX_SUFFIX, MANIFEST_NAME, SHARD_SUFFIX

_LIBRARIES = {"numpy": "numpy", "np": "numpy", "pt": "torch", "pytorch": "torch", "torch": "torch"}


def safe_open(path: str | os.PathLike[str], framework: str = "numpy", *, threads: int | None = None) -> Checkpoint:
    """Open a compressed model's directory or one of its files, to read tensors one at a time or parts of them.

    Files that were never compressed can be opened too. framework is what tensors are made of: ``"numpy"`` (with
    ml_dtypes) or ``"pt"`` (torch, which must have been imported). Of a directory the .safetensors files at its top
    are taken, or those that its index names. threads defaults to ``BITFORBIT_THREADS``, else all CPUs.

    Raises SourceNotFoundError, UsageError (also for DFloat11 directories, and if two files hold a tensor of the same
    name), MissingDependencyError, MissingPartError, FormatError for damaged files.
    """
    library = _LIBRARIES.get(framework)
    if library is None:
        raise UsageError(f"expected framework to be 'numpy' or 'pt', got {framework!r}")
    if library == "torch" and "torch" not in sys.modules:
        raise MissingDependencyError("framework 'pt' makes torch tensors: import torch first, or use 'numpy'")
    headers = {file: read_header(file) for file in _files(Path(path))}
    return Checkpoint(headers, library, threads)


class Checkpoint:
    """An open checkpoint; a context manager. Made by :func:`safe_open`.

    Its methods may be called from several threads at once. They raise UsageError for names that no file has and after
    the end of the ``with`` block, UnsupportedDtypeError for elements of less than a byte.
    """

    def __init__(self, headers: Mapping[Path, Header], library: str, threads: int | None) -> None:
        self._library = library
        self._files: dict[str, _File] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        largest = max((e.nbytes for header in headers.values() for e in header.tensors), default=0)
        pipe = Pipeline(threads, largest, None)
        with ExitStack() as stack:
            for path, header in headers.items():
                file = _File(path, header, pipe)
                stack.callback(file.close)
                self._metadata.update(file.original.metadata)
                for entry in file.original.tensors:
                    if entry.name in self._entries:
                        other = self._files[entry.name].path
                        raise UsageError(f"{path}: tensor {entry.name!r} is also in {other}; open one of the two")
                    self._files[entry.name], self._entries[entry.name] = file, entry
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def keys(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def metadata(self) -> dict[str, str]:
        """``__metadata__`` of the original files, together."""
        return dict(self._metadata)

    def get_tensor(self, name: str) -> Any:
        """A whole tensor, its checksums compared. Raises a FormatError for damaged data."""
        entry = self._entry(name)
        out, data = self._empty(entry, entry.shape)
        self._files[name].tensor(entry, data)
        return out

    def get_slice(self, name: str, *, check: bool = False) -> TensorSlice:
        """A tensor of which parts can be read by indexing it.

        The checksums cover whole tensors. With ``check`` every reading compares that of the stored bytes, which
        reads all of them into memory; without, damaged data may come out as wrong numbers, which ``bitforbit verify``
        finds.
        """
        return TensorSlice(self, self._entry(name), check)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise UsageError(f"expected the name of one of {len(self._entries)} tensors, got {name!r}; see keys()")
        return entry

    def _empty(self, entry: TensorEntry, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """A new array, and its bytes."""
        if entry.dtype not in dtypes.ARRAY_NAMES.values():
            raise UnsupportedDtypeError(f"tensor {entry.name!r}: {self._library} has no dtype for {entry.dtype}")
        out = tensors.empty(self._library, entry.dtype, shape)
        return out, tensors.writable_bytes(out, entry.dtype, shape)

    def _read(self, entry: TensorEntry, rows: Range | None, columns: Range | None, check: bool) -> Any:
        region = Region.of(entry.dtype, entry.shape, rows, columns)
        out, data = self._empty(entry, region.shape)
        self._files[entry.name].part(entry, region, data, check)
        return out


class TensorSlice:
    """One tensor of an open checkpoint; ``[...]`` reads part of it. Made by :meth:`Checkpoint.get_slice`."""

    def __init__(self, checkpoint: Checkpoint, entry: TensorEntry, check: bool) -> None:
        self._checkpoint = checkpoint
        self._entry = entry
        self._check = check

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Safetensors name of the element type, such as ``"BF16"``."""
        return self._entry.dtype

    def __len__(self) -> int:
        if not self._entry.shape:
            raise TypeError("len() of a tensor without dimensions")
        return self._entry.shape[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Any:
        """Part of the tensor, contiguous, by integers, slices with positive steps and ``...``, as numpy has it.

        Only the bytes of the blocks of rows (of the first dimension) are read that the first index covers; columns
        outside the last index are decoded and dropped piece by piece. Raises SliceIndexError (an IndexError) for
        integers outside, UsageError for other indices.
        """
        shape = self._entry.shape
        steps = indexing.normalized(index, shape)
        rows = columns = None
        if shape:
            rows = indexing.cover(steps[0])
            steps[0] = indexing.moved(steps[0], rows[0])
        if len(shape) > 1:
            columns = indexing.cover(steps[-1])
            steps[-1] = indexing.moved(steps[-1], columns[0])
        part = self._checkpoint._read(self._entry, rows, columns, self._check)
        taken = part[(*steps, ...)]  # with the dots numpy makes arrays without dimensions, no scalars
        if math.prod(taken.shape) == math.prod(part.shape):
            return taken
        return taken.copy() if tensors.library_of(part) == "numpy" else taken.clone()


class _File:
    """One safetensors file, compressed or not. ``original`` is the header of the file before it was compressed."""

    def __init__(self, path: Path, header: Header, pipe: Pipeline) -> None:
        self.path = path
        self._reader = ShardReader(open_shard(path), pipe) if is_shard(header) else None
        self.original = self._reader.shard.original if self._reader else header
        self._fd: int | None = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            raise UsageError(f"{self.path}: expected an open checkpoint, got one after the end of its `with` block")
        return self._fd

    def tensor(self, entry: TensorEntry, out: Any) -> None:
        """Read a whole tensor; of compressed files with its checksums."""
        if self._reader:
            self._reader.tensor(self._open(), entry, out)
        else:
            self.part(entry, Region.of(entry.dtype, entry.shape, None, None), out, False)

    def part(self, entry: TensorEntry, region: Region, out: Any, check: bool) -> None:
        """Read a region of a tensor."""
        if self._reader:
            self._reader.part(self._open(), entry, region, out, check=check)
        else:
            at = self.original.data_start + entry.begin
            read_plain(file_reader(self._open(), at, f"{self.path}, tensor {entry.name!r}"), region, out)


def _files(path: Path) -> list[Path]:
    """The safetensors files to open."""
    if not path.is_dir():
        if not path.exists():
            raise SourceNotFoundError(f"{path}: expected a model directory or a .safetensors file, got nothing")
        refuse_kind(path, [path.name])
        return [path]
    if df11_config(path):
        raise UsageError(f"{path}: a DFloat11 model, whose tensors cannot be read one by one; decompress it first")
    files = sorted(path.glob(f"*{SHARD_SUFFIX}"))
    if not files:
        refuse_kind(path, sorted(file.name for file in path.iterdir()))
        raise SourceNotFoundError(f"{path}: expected a directory with {SHARD_SUFFIX} files, got none at its top")
    maps = [(load_object(file) or {}).get("weight_map") for file in sorted(path.glob(f"*{INDEX_SUFFIX}"))]
    named = {path / str(file) for weight_map in maps if isinstance(weight_map, dict) for file in weight_map.values()}
    expected = set(named)
    if (path / MANIFEST_NAME).is_file():
        stored = read_manifest(path).files
        expected |= {path / file.path for file in stored if file.kind == "shard" and "/" not in file.path}
    if missing := sorted(expected - set(files)):
        raise MissingPartError(f"{missing[0]}: the index or {MANIFEST_NAME} names this file; fetch it again")
    return sorted(named) or files
