"""Safetensors files as the safetensors library writes them, read tensor by tensor and written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.errors import (
    DuplicateKeyError,
    FormatError,
    HeaderSizeError,
    HeaderSyntaxError,
    OffsetRangeError,
    OverlappingTensorsError,
    TensorSizeError,
    TruncatedFileError,
    UncoveredBytesError,
)

_MAX_HEADER_BYTES = 100_000_000
_MAX_SIZE = (1 << 63) - 1

# The library stores tensors by dtype, in this order, then by name (safetensors 0.8, `tensor.rs`).
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header. ``begin`` and ``end`` are byte offsets into the data that follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. ``tensors`` are in the order of the header; ``data_start`` and ``file_size`` in bytes."""

    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check a header. Raises the header errors of :mod:`bitforbit.errors`."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TruncatedFileError(f"{path}: expected a safetensors file, got {len(prefix)} bytes; download it again")
        length = int.from_bytes(prefix, "little")
        if length > min(_MAX_HEADER_BYTES, file_size - 8):
            raise HeaderSizeError(f"{path}: a header of {length} bytes exceeds the file or {_MAX_HEADER_BYTES} bytes")
        text = file.read(length)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except FormatError:
        raise
    except (ValueError, RecursionError) as e:
        raise HeaderSyntaxError(f"{path}: expected a header in JSON, got {e}; the file is damaged") from None
    if not isinstance(value, dict):
        raise HeaderSyntaxError(f"{path}: expected the header to be a JSON object, got {type(value).__name__}")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HeaderSyntaxError(f"{path}: expected __metadata__ to map strings to strings")
    tensors = tuple(_entry(name, member, path) for name, member in value.items())
    _check_cover(tensors, file_size - 8 - length, path)
    return Header(metadata, tensors, 8 + length, file_size)


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise DuplicateKeyError(f"{path}: the header names a tensor twice; the file is damaged")
    return result


def _entry(name: str, member: object, path: Path) -> TensorEntry:
    place = f"{path}, tensor {name!r}"
    if not isinstance(member, dict):
        raise HeaderSyntaxError(f"{place}: expected an object, got {type(member).__name__}")
    dtype, shape, offsets = member.get("dtype"), member.get("shape"), member.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderSyntaxError(f"{place}: expected dtype, shape and two data_offsets, got {str(member)[:120]}")
    num_bits = dtypes.bits(dtype)
    for dim in shape:
        num_bits *= dim
        if num_bits > _MAX_SIZE:
            raise TensorSizeError(f"{place}: shape {str(shape)[:80]} of {dtype} exceeds 2^63 bits")
    begin, end = offsets
    if begin > end:
        raise OffsetRangeError(f"{place}: expected begin <= end, got data_offsets [{begin}, {end}]")
    if num_bits != 8 * (end - begin):
        raise TensorSizeError(f"{place}: expected {num_bits / 8:g} bytes for {dtype} {shape}, got {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _check_cover(tensors: Iterable[TensorEntry], data_size: int, path: Path) -> None:
    position = 0
    for entry in sorted(tensors, key=lambda e: (e.begin, e.end)):
        if entry.begin < position:
            raise OverlappingTensorsError(f"{path}, tensor {entry.name!r}: begins inside the tensor before it")
        if entry.begin > position:
            raise UncoveredBytesError(f"{path}: bytes {position} to {entry.begin} of the data belong to no tensor")
        position = entry.end
    if position > data_size:
        raise TruncatedFileError(f"{path}: expected {position} bytes of data, got {data_size}; download it again")
    if position < data_size:
        raise UncoveredBytesError(f"{path}: the last {data_size - position} bytes of the file belong to no tensor")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file on disk."""

    path: Path
    data_start: int
    entry: TensorEntry

    def map(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, read-only, read from the file when they are touched."""
        if self.entry.nbytes == 0:
            return np.empty(0, np.uint8)
        offset = self.data_start + self.entry.begin
        return np.memmap(self.path, np.uint8, "r", offset, (self.entry.nbytes,))


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files in a directory, file by file, each in the order of its bytes.

    Raises DuplicateKeyError for a tensor that is in two files, and what :func:`read_header` raises.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        header = read_header(path)
        for entry in sorted(header.tensors, key=lambda e: (e.begin, e.end)):
            if entry.name in tensors:
                raise DuplicateKeyError(
                    f"expected every tensor once, got {entry.name!r} in {tensors[entry.name].path} and {path}; "
                    "remove the file that does not belong here"
                )
            tensors[entry.name] = StoredTensor(path, header.data_start, entry)
    return tensors


def library_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[TensorEntry]]:
    """Header bytes, length included, and entries in file order, as the library would write (name, dtype, shape)."""
    members: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    entries = []
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (_DTYPE_ORDER.index(t[1]), t[0].encode())):
        num_bits = dtypes.bits(dtype)
        for dim in shape:
            num_bits *= dim
        entries.append(TensorEntry(name, dtype, shape, position, position + num_bits // 8))
        members[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bits // 8]}
        position += num_bits // 8
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, entries
