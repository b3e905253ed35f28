"""One shard -> the original safetensors file, tensor by tensor in the order of the original."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.pipeline import CHUNK_BYTES, Pipeline, chunks
from bitforbit.archive.ranges import Read, Region, file_reader, memory_reader, read_coded, read_plain
from bitforbit.codecs import registry
from bitforbit.codecs.base import PART_ALIGNMENT, Bytes, EncodedTensor
from bitforbit.errors import BitforbitError, ChecksumError, CorruptTensorError
from bitforbit.format import checksum
from bitforbit.format.checksum import Digests
from bitforbit.format.header import TensorEntry
from bitforbit.format.layout import Shard
from bitforbit.format.spec import LENGTH_BYTES

OnError = Callable[[str, BitforbitError], None]


Sink = Callable[[Any], object]
"""Receives the bytes of the restored file in order: bytes, or an array of them."""


class ShardReader:
    """Decodes the tensors of one shard. Use it as a context manager."""

    def __init__(self, shard: Shard, pipe: Pipeline) -> None:
        """Raises UnsupportedVersionError for an unknown codec, CorruptTensorError for parts too small for a tensor.

        From here on no more memory is allocated than the shard's size warrants, whatever its record claims.
        """
        self.shard = shard
        self._pipe = pipe
        for name, record in shard.record.tensors.items():
            if not record.is_raw:
                codec = registry.get(record.codec, record.codec_version)
                try:
                    codec.check(record.dtype, record.shape, record.config, record.parts)
                except BitforbitError as e:
                    raise type(e)(f"{shard.path}, tensor {name!r}: {e}") from e

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The shard's descriptor."""
        fd = os.open(self.shard.path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def tensor(self, fd: int, entry: TensorEntry, out: Bytes) -> None:
        """Restore one tensor into ``out``, its size exactly.

        Raises ChecksumError, CorruptTensorError or TruncatedFileError, with the file and the tensor.
        """
        record = self.shard.record.tensors[entry.name]
        where = f"{self.shard.path}, tensor {entry.name!r}"
        begin = self.shard.header.data_start + self.shard.begin[entry.name]
        if record.is_raw:
            read_exactly(fd, out, begin, where)
            _check(where, "stored bytes", record.xxh3_stored, checksum.xxh3_64([out]))
            return
        with self._pipe.coded.hold(record.stored_bytes):
            stored = aligned_buffer(record.stored_bytes)
            read_exactly(fd, stored, begin, where)
            _check(where, "stored bytes", record.xxh3_stored, checksum.xxh3_64([stored]))
            parts: dict[str, Bytes] = {}
            position = 0
            for name, length in record.parts.items():
                parts[name] = stored[position : position + length]
                position += length
            coded = EncodedTensor(record.codec, record.codec_version, record.dtype, record.shape, record.config, parts)
            try:
                self._decode(coded, out)
            except BitforbitError as e:
                raise type(e)(f"{where}: {e}") from e
        _check(where, "decoded bytes", record.xxh3_decoded, checksum.xxh3_64([out]))

    def part(self, fd: int, entry: TensorEntry, region: Region, out: Bytes, *, check: bool) -> None:
        """Restore a region of a tensor into ``out``, its size exactly, reading only what it needs.

        The checksum covers the tensor as a whole: with ``check`` all of its stored bytes are read into memory and
        compared with it; without, damage is noticed only where digits contradict each other. Raises what ``tensor``
        raises.
        """
        where = f"{self.shard.path}, tensor {entry.name!r}"
        from_file = file_reader(fd, self.shard.header.data_start + self.shard.begin[entry.name], where)
        if not check:
            self._part(from_file, entry, region, out, where)
            return
        nbytes = self.shard.stored_bytes(entry)
        with self._pipe.coded.hold(nbytes):
            stored = aligned_buffer(nbytes)
            from_file(stored, 0)
            _check(where, "stored bytes", self.shard.record.tensors[entry.name].xxh3_stored, checksum.xxh3_64([stored]))
            self._part(memory_reader(stored), entry, region, out, where)

    def _part(self, read: Read, entry: TensorEntry, region: Region, out: Bytes, where: str) -> None:
        record = self.shard.record.tensors[entry.name]
        if not region.nbytes:
            return
        if record.is_raw:
            read_plain(read, region, out)
            return
        begins = dict(zip(record.parts, accumulate(record.parts.values(), initial=0), strict=False))

        def fetch(part: str, offset: int, data: Bytes) -> None:
            read(data, begins[part] + offset)

        codec = registry.get(record.codec, record.codec_version)
        end = region.end * region.width
        try:
            reader = codec.row_reader(record.dtype, record.shape, record.config, record.parts, fetch, end)
            read_coded(reader, region, out, self._pipe.codec_threads(region.nbytes))
        except CorruptTensorError as e:
            raise CorruptTensorError(f"{where}: {e}") from e

    def _decode(self, coded: EncodedTensor, out: Bytes) -> None:
        codec = registry.get(coded.codec, coded.codec_version)
        threads = self._pipe.codec_threads(out.nbytes)
        if out.ctypes.data % PART_ALIGNMENT and out.nbytes <= CHUNK_BYTES:
            aligned = aligned_buffer(out.nbytes)
            codec.decode(coded, aligned, None, threads)
            np.copyto(out, aligned)
        else:
            codec.decode(coded, out, None, threads)

    def restore(self, sink: Sink, *, sha256: bool, on_error: OnError | None = None) -> Digests:
        """Send the whole original file to ``sink``. Returns the checksums of what was sent.

        ``on_error`` is told of each tensor that fails, and zeros are sent in its place; without it the first error is
        raised.
        """
        raw_json = self.shard.original.raw_json
        head = len(raw_json).to_bytes(LENGTH_BYTES, "little") + raw_json
        with self.opened() as fd, self._pipe.hasher(sha256) as hasher:
            hasher.update(head)
            sink(head)
            for group in chunks(self.shard.original.by_offset()):
                self._restore_group(fd, group, sink, hasher.update, on_error)
            return hasher.digests()

    def _restore_group(
        self,
        fd: int,
        group: list[TensorEntry],
        sink: Sink,
        update: Callable[..., None],
        on_error: OnError | None,
    ) -> None:
        begin, end = group[0].begin, group[-1].end
        with self._pipe.lease(end - begin) as lease:
            for entry in group:
                view = lease.data[entry.begin - begin : entry.end - begin]
                try:
                    self.tensor(fd, entry, view)
                except BitforbitError as e:
                    if on_error is None:
                        raise
                    on_error(entry.name, e)
                    view[:] = 0
                del view
            update(lease)
            sink(lease.data)
        self._pipe.progress.advance(end - begin)


def check_file(shard: Shard, digests: Digests) -> None:
    """Compare a restored file's checksums with the record's. Raises ChecksumError."""
    where = f"{shard.path}, restored file"
    _check(where, "XXH3-128", shard.record.file.xxh3_128, digests.xxh3_128)
    if digests.sha256 is not None:
        _check(where, "SHA-256", shard.record.file.sha256, digests.sha256)


def _check(where: str, what: str, expected: str, got: str) -> None:
    if expected != got:
        raise ChecksumError(
            f"{where}: expected the checksum of the {what} to be {expected}, got {got}; "
            "the file is damaged, fetch it again"
        )
