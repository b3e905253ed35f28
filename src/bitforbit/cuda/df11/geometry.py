"""How a DFloat11 unit lies in GPU memory. Private: made at load from the unit's tensors, never on disk.

Four parts, bytes each, lengths multiples of 16:

``tables``: 2048 look-ups of 8 bytes for the next 11 bits, then the rows of ``luts`` as stored, 256 bytes each. A
    look-up is a u32 step (kernels/df11.cuh gives its bits) and up to four exponents, the first in the low byte.
``stream``: ``encoded_exponent``, padded with zeros.
``sign_mantissa``: as stored, padded with zeros.
``index``: a header of 64 bytes, u32 values: magic, weights, blocks, bytes of ``stream``, rows of ``luts``, bits of the
    shortest code, most weights of a block, zeros; then the gaps of every other window, as a thread decodes two windows:
    40 u32 per block, the first gap in the highest bits; then u32 positions [blocks + 1], padded with zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11.unit import BLOCK_BYTES, MAX_CODE_BITS, MAX_TABLES
from bitforbit.errors import CorruptTensorError

U8 = npt.NDArray[np.uint8]

PARTS = ("tables", "stream", "sign_mantissa", "index")

ALIGNMENT = 16
LOOKUP_BITS = 11
LOOKUP_SYMBOLS = 4
LOOKUP_BYTES = 8 << LOOKUP_BITS
ROW_BYTES = 256
HEADER_BYTES = 64
MAGIC = 0x31314644
"""The bytes DF11."""

THREADS = 256
TOTALS_BYTES = 4 * THREADS // 32
THREAD_BITS = 128
"""Of the stream, that one thread decodes: two windows."""
GAP_BITS = 5
GAP_BYTES = THREADS * GAP_BITS // 8
"""Per block."""


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of parts."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class Df11Geometry:
    """What the host knows of a unit's parts. Compared and hashed by identity."""

    elements: int
    """Weights of the unit."""
    blocks: int
    """Blocks of 4096 bytes of the stream, the last one perhaps shorter."""
    stream_bytes: int
    """Length of the part ``stream``."""
    table_rows: int
    """Decode tables as stored, and the row of code lengths."""
    shortest: int
    """Bits of the shortest code."""
    block_symbols: int
    """Most weights that begin in a block."""
    positions: npt.NDArray[np.uint32] = field(repr=False)
    """First weight of each block, then the number of weights: ``[blocks + 1]``."""

    @property
    def tables_bytes(self) -> int:
        """Length of the part ``tables``."""
        return LOOKUP_BYTES + ROW_BYTES * self.table_rows

    @property
    def index_bytes(self) -> int:
        """Length of the part ``index``."""
        return index_bytes(self.blocks)

    @functools.cached_property
    def part_bytes(self) -> tuple[int, int, int, int]:
        """Lengths of the parts, in their order."""
        return self.tables_bytes, self.stream_bytes, padded(self.elements), self.index_bytes

    @functools.cached_property
    def slot_words(self) -> int:
        """Words of 4 exponents for what a thread decodes: codes that start in its bits, and up to 3 more."""
        return -(-((THREAD_BITS - 1) // self.shortest + LOOKUP_SYMBOLS) // 4)

    @functools.cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block of threads, all that it has."""
        slots = 4 * self.slot_words * THREADS
        return self.tables_bytes + TOTALS_BYTES + slots + padded(self.block_symbols + 7)

    def blocks_of(self, begin: int, end: int) -> tuple[int, int]:
        """The blocks [first, last + 1) that hold the weights [begin, end), which is not empty."""
        first = int(np.searchsorted(self.positions[:-1], begin, "right")) - 1
        return first, int(np.searchsorted(self.positions[:-1], end, "left"))


def index_bytes(blocks: int) -> int:
    """Length of the part ``index``."""
    return HEADER_BYTES + GAP_BYTES * blocks + padded(4 * (blocks + 1))


def index_part(geometry: Df11Geometry, gaps: U8) -> U8:
    """The part ``index``. gaps ``[320 blocks]``, as stored."""
    index = np.zeros(geometry.index_bytes, np.uint8)
    header = [MAGIC, geometry.elements, geometry.blocks, geometry.stream_bytes, geometry.table_rows]
    header += [geometry.shortest, geometry.block_symbols]
    index[: 4 * len(header)].view("<u4")[:] = header
    end = HEADER_BYTES + GAP_BYTES * geometry.blocks
    every_other = np.packbits(np.unpackbits(gaps).reshape(-1, 2, GAP_BITS)[:, 0])
    index[HEADER_BYTES:end].view("<u4")[:] = every_other.view(">u4")
    index[end : end + 4 * geometry.positions.size].view("<u4")[:] = geometry.positions
    return index


def geometry_of(index: U8, elements: int, stream_bytes: int) -> Df11Geometry:
    """The geometry of a unit from a host copy of its part ``index``.

    ``elements`` are the unit's weights, ``stream_bytes`` the length of the part ``stream``. Raises CorruptTensorError
    if they do not belong together.
    """
    if index.dtype != np.uint8 or index.ndim != 1 or index.size < index_bytes(1):
        raise CorruptTensorError(
            f"expected a DF11 index of uint8 [{index_bytes(1)} or more], got {index.dtype} {list(index.shape)}"
        )
    index = np.ascontiguousarray(index)
    header = index[:HEADER_BYTES].view("<u4").tolist()
    magic, stored_elements, blocks, stored_bytes, table_rows, shortest, block_symbols = header[:7]
    if magic != MAGIC or any(header[7:]):
        raise CorruptTensorError(
            f"expected a DF11 index that begins with {MAGIC:#x}, got {magic:#x}; load the unit again"
        )
    if (stored_elements, stored_bytes) != (elements, stream_bytes):
        raise CorruptTensorError(
            f"the DF11 index is of {stored_elements} weights in {stored_bytes} stream bytes, got {elements} weights in "
            f"{stream_bytes} bytes: parts of different units"
        )
    if index.size != index_bytes(blocks) or not 0 <= blocks * BLOCK_BYTES - stream_bytes < BLOCK_BYTES:
        raise CorruptTensorError(
            f"expected a DF11 index of {index_bytes(blocks)} bytes for {blocks} blocks of {stream_bytes} stream bytes, "
            f"got {index.size}"
        )
    positions = index[HEADER_BYTES + GAP_BYTES * blocks :].view("<u4")[: blocks + 1].astype(np.uint32)
    steps = np.diff(positions.astype(np.int64))
    if positions[0] != 0 or positions[-1] != elements or steps.min() < 0 or steps.max() != block_symbols:
        raise CorruptTensorError(
            f"expected DF11 positions from 0 to {elements} by at most {block_symbols}, got {positions[0]} to "
            f"{positions[-1]} by {steps.min()} to {steps.max()}"
        )
    if not 2 <= table_rows <= MAX_TABLES + 1 or not 1 <= shortest <= MAX_CODE_BITS or block_symbols > 8 * BLOCK_BYTES:
        raise CorruptTensorError(
            f"expected a DF11 index of 2 to {MAX_TABLES + 1} table rows, codes from 1 to {MAX_CODE_BITS} bits, blocks "
            f"of up to {8 * BLOCK_BYTES} weights, got {table_rows}, {shortest} and {block_symbols}"
        )
    return Df11Geometry(elements, blocks, stream_bytes, table_rows, shortest, block_symbols, positions)
