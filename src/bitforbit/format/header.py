"""Safetensors headers: a strict parser for files that nobody vouches for, and a writer.

Layout of the file: 8 bytes little-endian N, N bytes of JSON, the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bitforbit import dtypes
from bitforbit.errors import (
    HeaderSizeError,
    HeaderSyntaxError,
    OffsetRangeError,
    OverlappingTensorsError,
    TensorSizeError,
    TruncatedFileError,
    UncoveredBytesError,
    UnknownDtypeError,
)
from bitforbit.format.jsontext import MAX_INTEGER, is_size, is_unicode, parse_header_json
from bitforbit.format.spec import HEADER_ALIGNMENT, LENGTH_BYTES, MAX_HEADER_BYTES, round_up

METADATA_KEY = "__metadata__"


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

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. ``tensors`` are in the order of the header; ``data_start`` and ``file_size`` in bytes."""

    raw_json: bytes
    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_size: int

    def by_offset(self) -> list[TensorEntry]:
        """The tensors in the order of their bytes; those without bytes before the one that begins there."""
        return sorted(self.tensors, key=lambda e: (e.begin, e.end))


def read_header(source: str | os.PathLike[str] | BinaryIO) -> Header:
    """Read and check the header of a safetensors file: a path, or a file opened for reading.

    Raises TruncatedFileError, HeaderSizeError, HeaderSyntaxError, DuplicateKeyError, UnknownDtypeError,
    TensorSizeError, OffsetRangeError, OverlappingTensorsError or UncoveredBytesError.
    """
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as file:
            return _read(file, os.fspath(source))
    return _read(source, str(getattr(source, "name", "safetensors file")))


def _read(file: BinaryIO, where: str) -> Header:
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise TruncatedFileError(
            f"{where}: expected a safetensors file of at least {LENGTH_BYTES} bytes, got {len(prefix)}; "
            "download it again"
        )
    length = int.from_bytes(prefix, "little")
    if prefix == b"version ":
        raise HeaderSizeError(f"{where}: expected a safetensors file, got a Git LFS pointer; run `git lfs pull` first")
    if length > MAX_HEADER_BYTES or length > file_size - LENGTH_BYTES:
        raise HeaderSizeError(
            f"{where}: expected a header of at most {min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES)} bytes, "
            f"got a length of {length}; the file is damaged, incomplete or not a safetensors file"
        )
    raw_json = file.read(length)
    if len(raw_json) < length:
        raise TruncatedFileError(f"{where}: expected {length} bytes of header, got {len(raw_json)}")
    return parse_header(raw_json, file_size, where)


def parse_header(raw_json: bytes, file_size: int, where: str) -> Header:
    """Check a header's JSON for a file of ``file_size`` bytes. Raises what :func:`read_header` raises."""
    data_start = LENGTH_BYTES + len(raw_json)
    value = parse_header_json(raw_json, where, HeaderSyntaxError)
    if not isinstance(value, dict):
        raise HeaderSyntaxError(f"{where}: expected the header to be a JSON object, got {type(value).__name__}")
    metadata = _parse_metadata(value.pop(METADATA_KEY, None), where)
    tensors = tuple(_parse_entry(name, entry, where) for name, entry in value.items())
    _check_cover(tensors, file_size - data_start, where)
    return Header(raw_json, metadata, tensors, data_start, file_size)


def _parse_metadata(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise HeaderSyntaxError(f"{where}: expected {METADATA_KEY} to be an object, got {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(text, str) or not is_unicode(text) or not is_unicode(key):
            raise HeaderSyntaxError(
                f"{where}: expected the strings of {METADATA_KEY} to be text, got {key!r}: {text!r}"
            )
    return value


def _parse_entry(name: str, value: object, where: str) -> TensorEntry:
    place = f"{where}, tensor {name!r}"
    if not is_unicode(name):
        raise HeaderSyntaxError(f"{place}: expected a name that is valid Unicode")
    if not isinstance(value, dict):
        raise HeaderSyntaxError(f"{place}: expected an object, got {type(value).__name__}")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise HeaderSyntaxError(f"{place}: expected dtype to be a string, got {dtype!r}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise HeaderSyntaxError(f"{place}: expected shape to be a list of sizes, got {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise HeaderSyntaxError(f"{place}: expected data_offsets to be two offsets, got {str(offsets)[:80]}")
    try:
        num_bits = dtypes.bits(dtype)
    except UnknownDtypeError as e:
        raise UnknownDtypeError(f"{place}: {e}") from None
    begin, end = offsets
    if begin > end:
        raise OffsetRangeError(f"{place}: expected begin <= end, got data_offsets [{begin}, {end}]")
    for dim in shape:  # one at a time: the product of a hostile shape could have millions of digits
        num_bits *= dim
        if num_bits > MAX_INTEGER:
            raise TensorSizeError(f"{place}: shape {str(shape)[:80]} of {dtype} exceeds 2^63 bits")
    if num_bits % 8 or num_bits // 8 != end - begin:
        raise TensorSizeError(
            f"{place}: expected {num_bits / 8:g} bytes for {dtype} {str(shape)[:80]}, got {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _check_cover(tensors: Iterable[TensorEntry], data_size: int, where: str) -> None:
    position = 0
    fault: Exception | None = None
    outside: TensorEntry | None = None
    for entry in sorted(tensors, key=lambda e: (e.begin, e.end)):
        if entry.end > data_size and outside is None:
            outside = entry
        if fault is None and entry.begin < position:
            fault = OverlappingTensorsError(
                f"{where}, tensor {entry.name!r}: begins at {entry.begin}, inside the tensor that ends at {position}"
            )
        if fault is None and entry.begin > position:
            fault = UncoveredBytesError(f"{where}: bytes {position} to {entry.begin} of the data belong to no tensor")
        position = max(position, entry.end)
    if outside is not None and fault is None:
        raise TruncatedFileError(
            f"{where}: expected {position} bytes of data, got {data_size}; the file is incomplete, download it again"
        )
    if outside is not None:
        raise OffsetRangeError(
            f"{where}, tensor {outside.name!r}: expected offsets up to {data_size}, "
            f"got [{outside.begin}, {outside.end}]"
        )
    if fault is not None:
        raise fault
    if position < data_size:
        raise UncoveredBytesError(f"{where}: the last {data_size - position} bytes of the file belong to no tensor")


def build_header(
    entries: Iterable[TensorEntry], metadata: Mapping[str, str], reserved_size: int | None = None
) -> bytes:
    """Length, JSON and padding of a header, all together a multiple of 64 bytes, or ``reserved_size`` bytes.

    Raises HeaderSizeError if the header exceeds ``reserved_size`` or the limit of the format.
    """
    members: dict[str, object] = {METADATA_KEY: dict(metadata)}
    for e in entries:
        members[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    size = round_up(LENGTH_BYTES + len(text), HEADER_ALIGNMENT)
    if reserved_size is not None:
        if size > reserved_size or reserved_size % HEADER_ALIGNMENT:
            raise HeaderSizeError(f"expected a header of at most {reserved_size} bytes, got {size}")
        size = reserved_size
    length = size - LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise HeaderSizeError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
