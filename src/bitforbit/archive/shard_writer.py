"""One safetensors file -> one shard (docs/format.md, sections 1 and 2).

Space for the header is reserved first, from an upper bound; tensors are read in file order, coded and appended; the
uncompressed ones follow in a second pass; the header comes last. If the bound was too small, or wasteful for a
file of many tiny tensors, the data is moved within the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, Protocol

import numpy as np

from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.pipeline import CHUNK_BYTES, Pipeline, StreamHasher, chunks
from bitforbit.archive.source import SourceFile
from bitforbit.codecs.base import PART_ALIGNMENT, Bytes, Codec, EncodedTensor
from bitforbit.dtypes import FLOAT_LAYOUTS
from bitforbit.errors import ChecksumError, HeaderSizeError
from bitforbit.format import checksum
from bitforbit.format.checksum import Digests, FileHash
from bitforbit.format.header import Header, TensorEntry, build_header
from bitforbit.format.layout import raw_order, shard_metadata, stored_entries
from bitforbit.format.record import OriginalFile, ShardRecord, TensorRecord
from bitforbit.format.spec import LENGTH_BYTES, MAX_HEADER_BYTES, RAW_CODEC, part_name

_KEPT_BYTES = 16 << 20
"""Small uncompressed tensors kept from the first pass, so that the second one need not read them again."""

_WASTE_LIMIT = 1000
"""Unused header space is given back where it exceeds 1 / _WASTE_LIMIT of the file."""

_MIN_VECTOR = 1 << 16
"""Elements from which on vectors are coded: biases and norms are a thousandth of a model, and simpler to use plain."""

Select = Callable[[str], bool]


@contextmanager
def opened(file: SourceFile) -> Iterator[int]:
    """A source file's descriptor. Raises ChecksumError if the file changes while it is open."""
    fd = os.open(file.location, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield fd
        info = os.fstat(fd)
        if (info.st_size, info.st_mtime_ns) != file.stamp:
            raise ChecksumError(f"{file.location}: changed while it was being read; run again when nothing writes it")
    finally:
        os.close(fd)


class Coder:
    """Decides which tensors of one file are coded, and codes them."""

    def __init__(self, header: Header, codec: Codec, select: Select, pipe: Pipeline) -> None:
        self._codec = codec
        self._select = select
        self._pipe = pipe
        self._names = {entry.name for entry in header.tensors}

    def encode(self, entry: TensorEntry, data: Bytes) -> EncodedTensor | None:
        """Coded tensor; None where it is not selected, coding does not pay, or the parts' names are taken."""
        if entry.dtype not in FLOAT_LAYOUTS or entry.nbytes == 0 or not self._select(entry.name):
            return None
        if len(entry.shape) < 2 and entry.elements < _MIN_VECTOR:
            return None
        if any(part_name(entry.name, part) in self._names for part in self._codec.part_names):
            return None
        if data.ctypes.data % PART_ALIGNMENT and entry.nbytes <= CHUNK_BYTES:
            aligned = aligned_buffer(entry.nbytes)
            np.copyto(aligned, data)
            data = aligned
        threads = self._pipe.codec_threads(entry.nbytes)
        coded = self._codec.encode(data, entry.dtype, entry.shape, threads)
        return coded if coded is not None and coded.nbytes < entry.nbytes else None


Read = Callable[[Bytes, int], None]
"""Fills a buffer with the bytes of whole tensors, from an offset into the data on."""


class TensorBytes(Protocol):
    """Where a shard's tensors come from: a file, or a model in memory."""

    def opened(self) -> AbstractContextManager[Read]:
        """What reads, for as long as the block lasts. The same offset gives the same bytes every time."""
        ...

    def __str__(self) -> str:
        """What error messages call it."""
        ...


class FileBytes:
    """The tensors of a safetensors file."""

    def __init__(self, file: SourceFile, header: Header) -> None:
        self._file = file
        self._data_start = header.data_start

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """See :class:`TensorBytes`. Raises TruncatedFileError and ChecksumError if the file changes."""
        with opened(self._file) as fd:
            yield lambda out, begin: read_exactly(fd, out, self._data_start + begin, str(self))

    def __str__(self) -> str:
        return str(self._file.location)


class ShardWriter:
    """Writes one shard into ``out``, which is open for writing and reading."""

    def __init__(self, source: TensorBytes, header: Header, codec: Codec, select: Select, pipe: Pipeline) -> None:
        self._source = source
        self._header = header
        self._codec = codec
        self._select = select
        self._pipe = pipe
        self._coder = Coder(header, codec, select, pipe)
        self._records: dict[str, TensorRecord] = {}
        self._kept: dict[str, bytes] = {}
        self._kept_bytes = 0

    def write(self, out: BinaryIO) -> Digests:
        """Code every tensor. Returns the checksums of the original file."""
        reserved = header_bound(self._header, self._codec, self._select)
        out.seek(reserved)
        with self._source.opened() as read, self._pipe.hasher() as hasher:
            hasher.update(len(self._header.raw_json).to_bytes(LENGTH_BYTES, "little") + self._header.raw_json)
            for group in chunks(self._header.by_offset()):
                self._write_group(read, group, hasher, out)
            self._write_raw(read, out)
            digests = hasher.digests()
        self._finish(out, reserved, digests)
        return digests

    def _write_group(self, read: Read, group: list[TensorEntry], hasher: StreamHasher, out: BinaryIO) -> None:
        begin, end = group[0].begin, group[-1].end
        with self._pipe.lease(end - begin) as lease:
            read(lease.data, begin)
            hasher.update(lease)
            for entry in group:
                self._write_tensor(entry, lease.data[entry.begin - begin : entry.end - begin], out)
        self._pipe.progress.advance(end - begin)

    def _write_tensor(self, entry: TensorEntry, data: Bytes, out: BinaryIO) -> None:
        decoded = checksum.xxh3_64([data])
        with self._pipe.coded.hold(entry.nbytes):
            coded = self._coder.encode(entry, data)
            if coded is not None:
                for part in coded.parts.values():
                    out.write(part.data)
                self._records[entry.name] = TensorRecord(
                    codec=coded.codec,
                    xxh3_stored=checksum.xxh3_64(coded.parts.values()),
                    codec_version=coded.codec_version,
                    dtype=entry.dtype,
                    shape=entry.shape,
                    config=coded.config,
                    parts={name: part.nbytes for name, part in coded.parts.items()},
                    xxh3_decoded=decoded,
                )
                return
        self._records[entry.name] = TensorRecord(RAW_CODEC, decoded)
        if self._kept_bytes + entry.nbytes <= _KEPT_BYTES:
            self._kept[entry.name] = data.tobytes()
            self._kept_bytes += entry.nbytes

    def _write_raw(self, read: Read, out: BinaryIO) -> None:
        for entry in raw_order(e for e in self._header.by_offset() if self._records[e.name].is_raw):
            if entry.name in self._kept:
                out.write(self._kept.pop(entry.name))
                continue
            with self._pipe.lease(entry.nbytes) as lease:
                read(lease.data, entry.begin)
                if checksum.xxh3_64([lease.data]) != self._records[entry.name].xxh3_stored:
                    raise ChecksumError(f"{self._source}, tensor {entry.name!r}: changed between two reads")
                out.write(lease.data.data)

    def _finish(self, out: BinaryIO, reserved: int, digests: Digests) -> None:
        original = OriginalFile(digests.size, digests.sha256 or "", digests.xxh3_128, self._header.raw_json)
        tensors = {entry.name: self._records[entry.name] for entry in self._header.by_offset()}
        metadata = shard_metadata(self._header, ShardRecord(original, tensors))
        entries = stored_entries(self._header, tensors)
        header = build_header(entries, metadata)
        out.flush()
        end = out.seek(0, os.SEEK_END)
        end = max(end, reserved)  # a shard without data: nothing was written behind the reserved space
        if len(header) > reserved or (reserved - len(header)) * _WASTE_LIMIT > end:
            move(out.fileno(), reserved, end, len(header))
            out.truncate(end - reserved + len(header))
        else:
            header = build_header(entries, metadata, reserved)
        out.seek(0)
        out.write(header)


def header_bound(header: Header, codec: Codec, select: Select) -> int:
    """Bytes that the shard's header surely fits in, for configs of up to 256 characters; at most the format's limit."""
    digits = "f" * 64
    tensors: dict[str, TensorRecord] = {}
    for e in header.tensors:
        if e.dtype in FLOAT_LAYOUTS and e.nbytes and select(e.name):
            parts = dict.fromkeys(codec.part_names, e.nbytes)
            config: Mapping[str, str] = {"config": "x" * 256}
            tensors[e.name] = TensorRecord(
                codec.name, digits[:16], codec.version, e.dtype, e.shape, config, parts, digits[:16]
            )
        else:
            tensors[e.name] = TensorRecord(RAW_CODEC, digits[:16])
    record = ShardRecord(OriginalFile(header.file_size, digits, digits[:32], header.raw_json), tensors)
    return len(build_header(stored_entries(header, tensors), shard_metadata(header, record)))


def move(fd: int, begin: int, end: int, to: int) -> None:
    """Move bytes [begin, end) of a file to offset ``to``; the ranges may overlap."""
    buffer = aligned_buffer(CHUNK_BYTES)
    starts = range(begin, end, CHUNK_BYTES)
    for start in starts if to < begin else reversed(starts):
        view = buffer[: min(CHUNK_BYTES, end - start)]
        read_exactly(fd, view, start, "staged file")
        write_at(fd, view, start - begin + to)


def write_at(fd: int, data: Bytes, offset: int) -> None:
    """Write all bytes at an offset."""
    view = memoryview(data.data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def hash_stored(fd: int) -> Digests:
    """Size and XXH3-128 of a whole file."""
    state = FileHash(sha256=False)
    buffer = aligned_buffer(CHUNK_BYTES)
    offset = 0
    while count := os.preadv(fd, [buffer.data], offset):
        state.update(buffer[:count])
        offset += count
    return state.digests()


def fits(header: Header, codec: Codec, select: Select) -> bool:
    """Whether the shard's header stays within the limit of the safetensors format."""
    if len(header.raw_json) < MAX_HEADER_BYTES // 50:
        return True
    try:
        header_bound(header, codec, select)
    except HeaderSizeError:
        return False
    return True
