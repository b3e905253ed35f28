"""Where the tensors of an original file lie in its shard (docs/format.md, section 1, "Order")."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitforbit import dtypes
from bitforbit.errors import ManifestError, MissingPartError
from bitforbit.format.header import Header, TensorEntry, parse_header, read_header
from bitforbit.format.record import ShardRecord, TensorRecord, read_record
from bitforbit.format.spec import (
    HEADER_ALIGNMENT,
    MAX_EXPANSION,
    RECORD_CHECKSUM_KEY,
    RECORD_KEY,
    part_name,
)


def raw_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Uncompressed tensors as they are stored: by descending element width, then by offset."""
    return sorted(entries, key=lambda e: (-dtypes.bits(e.dtype), e.begin, e.end))


def stored_entries(original: Header, tensors: Mapping[str, TensorRecord]) -> list[TensorEntry]:
    """Header entries of the shard: parts of the compressed tensors, then the uncompressed tensors."""
    stored: list[TensorEntry] = []
    position = 0
    order = original.by_offset()
    for entry in order:
        for part, length in tensors[entry.name].parts.items():
            name = part_name(entry.name, part)
            stored.append(TensorEntry(name, "U8", (length,), position, position + length))
            position += length
    for entry in raw_order(e for e in order if tensors[e.name].is_raw):
        stored.append(TensorEntry(entry.name, entry.dtype, entry.shape, position, position + entry.nbytes))
        position += entry.nbytes
    return stored


def shard_metadata(original: Header, record: ShardRecord) -> dict[str, str]:
    """``__metadata__`` of the shard: the original's entries, the format, the record."""
    return {**original.metadata, "format": original.metadata.get("format", "pt"), **record.metadata()}


@dataclass(frozen=True, slots=True)
class Shard:
    """A compressed shard whose header, record and layout agree. ``begin`` maps tensors to their first stored byte."""

    path: Path
    header: Header
    record: ShardRecord
    original: Header
    begin: Mapping[str, int]

    def stored_bytes(self, entry: TensorEntry) -> int:
        """Bytes that a tensor of the original takes in this file."""
        record = self.record.tensors[entry.name]
        return entry.nbytes if record.is_raw else record.stored_bytes

    def stored_names(self, name: str) -> list[str]:
        """Names in this file of one tensor of the original."""
        record = self.record.tensors[name]
        return [name] if record.is_raw else [part_name(name, part) for part in record.parts]

    @property
    def compressed_tensors(self) -> int:
        """How many tensors are stored in coded form."""
        return sum(not record.is_raw for record in self.record.tensors.values())


def is_shard(header: Header) -> bool:
    """Whether a safetensors file says that it is compressed by bitforbit."""
    return RECORD_KEY in header.metadata or RECORD_CHECKSUM_KEY in header.metadata


def open_shard(path: Path) -> Shard:
    """Read a shard's header and record and check that they agree. Reads no tensor data.

    Raises what ``read_header`` and ``read_record`` raise, ManifestError and MissingPartError.
    """
    where = os.fspath(path)
    header = read_header(path)
    record = read_record(header.metadata, where)
    if header.data_start % HEADER_ALIGNMENT:
        raise ManifestError(f"{where}: expected data at a multiple of {HEADER_ALIGNMENT}, got {header.data_start}")
    if record.file.size > MAX_EXPANSION * header.file_size:
        raise ManifestError(f"{where}: an original of {record.file.size} bytes cannot come from {header.file_size}")
    original = parse_header(record.file.header, record.file.size, f"{where}, original header")
    _check_tensors(original, record, where)
    expected = stored_entries(original, record.tensors)
    actual = {entry.name: entry for entry in header.tensors}
    begin: dict[str, int] = {}
    for entry in expected:
        if entry.name not in actual:
            raise MissingPartError(f"{where}: expected a tensor {entry.name!r}, which the record names, got none")
        if actual.pop(entry.name) != entry:
            raise ManifestError(f"{where}: tensor {entry.name!r} is not where the record and docs/format.md put it")
        begin[entry.name] = entry.begin
    if actual:
        raise ManifestError(f"{where}: the record does not name {next(iter(actual))!r}; the file is damaged")
    places = {}
    for entry in original.tensors:
        parts = record.tensors[entry.name].parts
        places[entry.name] = begin[part_name(entry.name, next(iter(parts))) if parts else entry.name]
    return Shard(path, header, record, original, places)


def _check_tensors(original: Header, record: ShardRecord, where: str) -> None:
    names = {entry.name for entry in original.tensors}
    if names != record.tensors.keys():
        odd = sorted(names ^ record.tensors.keys())[0]
        raise ManifestError(f"{where}: {odd!r} is named by only one of the record and the original header")
    for entry in original.tensors:
        tensor = record.tensors[entry.name]
        if not tensor.is_raw and (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise ManifestError(
                f"{where}, tensor {entry.name!r}: expected {entry.dtype} {list(entry.shape)} as in the original, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
