"""Part of a tensor of a safetensors file, compressed or not: only the bytes of the rows asked for are read.

A tensor of shape [d0, ..., dn] is seen as *lines*, its last dimension; a vector has one element per line. A region is a
range of lines, and of the elements of each. It is read in pieces of whole blocks, so that memory stays at the result
and one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bitforbit import dtypes
from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.pipeline import CHUNK_BYTES
from bitforbit.codecs.base import Bytes, RowReader
from bitforbit.errors import UnsupportedDtypeError, UsageError

Range = tuple[int, int]

Read = Callable[[Bytes, int], None]
"""Fills an array with a tensor's stored bytes from an offset on."""


@dataclass(frozen=True, slots=True)
class Region:
    """Elements [left, right) of the lines [begin, end) of a tensor whose lines have ``width`` elements.

    ``shape`` is that of the result, ``item_bytes`` the size of an element.
    """

    shape: tuple[int, ...]
    item_bytes: int
    width: int
    begin: int
    end: int
    left: int
    right: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], rows: Range | None, columns: Range | None) -> Region:
        """Rows [begin, end) of the first dimension and columns [begin, end) of the last one; None for all.

        Raises UsageError for a range outside, UnsupportedDtypeError for elements of less than a byte.
        """
        bits = dtypes.bits(dtype)
        if bits % 8:
            raise UnsupportedDtypeError(f"expected elements of whole bytes, got {dtype}; read the whole tensor")
        if len(shape) == 1 and columns is not None:
            if rows is not None:
                raise UsageError("expected rows or columns of a vector, got both; they are the same")
            rows, columns = columns, None
        size = list(shape)
        first, last = _checked(shape, 0, "rows", rows), _checked(shape, -1, "columns", columns)
        if rows is not None:
            size[0] = first[1] - first[0]
        if columns is not None:
            size[-1] = last[1] - last[0]
        lines_per_row = math.prod(shape[1:-1])
        width = shape[-1] if len(shape) > 1 else 1
        left, right = last if len(shape) > 1 else (0, 1)
        return cls(
            tuple(size), bits // 8, width, first[0] * lines_per_row, first[1] * lines_per_row, left, right
        )  # fmt: skip

    @property
    def line_bytes(self) -> int:
        """Bytes of a line of the tensor."""
        return self.width * self.item_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def whole_lines(self) -> bool:
        """Whether lines are asked for from end to end, so that the region is one run of bytes."""
        return (self.left, self.right) == (0, self.width)

    def pieces(self, elements: int) -> Iterator[Range]:
        """Ranges of lines of about that many elements, which end where a multiple of it does, if a line ends there."""
        at = self.begin if self.nbytes else self.end
        while at < self.end:
            border = (at * self.width // elements + 1) * elements
            end = min(self.end, max(at + 1, border // self.width))
            yield at, end
            at = end

    def lines(self, out: Bytes, begin: int, end: int) -> Bytes:
        """The lines [begin, end) within the region's bytes."""
        each = (self.right - self.left) * self.item_bytes
        return out[(begin - self.begin) * each : (end - self.begin) * each]

    def copy(self, lines: Bytes, target: Bytes) -> None:
        """Take the region's columns out of whole lines."""
        columns = slice(self.left * self.item_bytes, self.right * self.item_bytes)
        np.copyto(target.reshape(-1, columns.stop - columns.start), lines.reshape(-1, self.line_bytes)[:, columns])


def _checked(shape: tuple[int, ...], dimension: int, what: str, wanted: Range | None) -> Range:
    if not shape:
        if wanted is not None:
            raise UsageError(f"expected no {what} for a tensor without dimensions, got {wanted}")
        return 0, 1
    length = shape[dimension]
    if wanted is None:
        return 0, length
    begin, end = wanted
    if not 0 <= begin <= end <= length:
        raise UsageError(f"expected {what} within 0 to {length}, got {begin} to {end}")
    return begin, end


def file_reader(fd: int, at: int, where: str) -> Read:
    """Reads a tensor that is stored at byte ``at`` of a file. Raises TruncatedFileError."""
    return lambda out, offset: read_exactly(fd, out, at + offset, where)


def memory_reader(stored: Bytes) -> Read:
    """Reads a tensor whose stored bytes are in memory."""
    return lambda out, offset: np.copyto(out, stored[offset : offset + out.size])


def read_plain(read: Read, region: Region, out: Bytes) -> None:
    """Read a region of a tensor that is stored uncompressed."""
    if region.whole_lines:
        read(out, region.begin * region.line_bytes)
        return
    scratch = aligned_buffer(0)
    for begin, end in region.pieces(max(1, CHUNK_BYTES // region.item_bytes)):
        scratch, lines = _room(scratch, (end - begin) * region.line_bytes)
        read(lines, begin * region.line_bytes)
        region.copy(lines, region.lines(out, begin, end))


def read_coded(reader: RowReader, region: Region, out: Bytes, threads: int) -> None:
    """Decode a region of a compressed tensor. Raises CorruptTensorError, and what fetching its bytes raises."""
    cols, width = reader.cols, region.width
    block = reader.step * cols
    scratch = aligned_buffer(0)
    for begin, end in region.pieces(block * max(1, CHUNK_BYTES // (block * region.item_bytes))):
        target = region.lines(out, begin, end)
        first, last = begin * width // cols, -(-end * width // cols)
        if region.whole_lines and (first * cols, last * cols) == (begin * width, end * width):
            reader.read(first, last, target, threads)
            continue
        scratch, decoded = _room(scratch, (last - first) * cols * region.item_bytes)
        reader.read(first, last, decoded, threads)
        skip = (begin * width - first * cols) * region.item_bytes
        region.copy(decoded[skip : skip + (end - begin) * region.line_bytes], target)


def _room(scratch: Bytes, nbytes: int) -> tuple[Bytes, Bytes]:
    """Scratch of at least that many bytes, the old one if it will do, and its first bytes."""
    if scratch.size < nbytes:
        scratch = aligned_buffer(nbytes)
    return scratch, scratch[:nbytes]
