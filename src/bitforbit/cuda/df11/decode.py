"""Launches of the DFloat11 kernels. They only enqueue: no allocation, no copy, no waiting."""

from __future__ import annotations

from collections.abc import Sequence

from bitforbit.cuda.df11.geometry import GAP_BYTES, HEADER_BYTES, PARTS, THREADS, Df11Geometry
from bitforbit.cuda.kernel import U32, U64, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.queue import Queue
from bitforbit.errors import CorruptTensorError, UsageError

Part = tuple[int, int]
"""Address and length in bytes of a part."""

_UNIT = (Pointer, Pointer, Pointer, Pointer, Pointer, U32, U32, U32, U32, U32, U32, U32)

DECODE = Kernel("df11_decode", "df11.cu", (*_UNIT, U32, U32, U32, U32, Pointer, Pointer))
ROWS = Kernel("df11_rows", "df11.cu", (*_UNIT, U32, U32, U32, Pointer, U32, U64, Pointer, Pointer))
KERNELS: tuple[Kernel, ...] = (DECODE, ROWS)

_RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes per block of threads."""
_RESIDENT = 4
"""Blocks of threads per multiprocessor for which the kernels are compiled."""


def decode(
    queue: Queue, parts: Sequence[Part], geometry: Df11Geometry, begin: int, end: int, out: int, status: int = 0
) -> None:
    """Decode the unit's weights [begin, end) as BF16 to ``out``, which has an even address.

    Fastest where ``out - 2 * begin`` is a multiple of 16, as for a matrix that begins at a multiple of 8 weights.
    status: address of a u32, or 0; gets bit 0 where the data is corrupt. Raises UsageError for a range beyond the unit,
    CorruptTensorError for parts of other lengths.
    """
    _check(parts, geometry)
    if not 0 <= begin <= end <= geometry.elements:
        raise UsageError(f"expected a range within the unit's {geometry.elements} weights, got [{begin}, {end})")
    if begin == end:
        return
    first, last = geometry.blocks_of(begin, end)
    config = decode_config(geometry, last - first, queue.properties)
    queue.launch(DECODE, config, *_unit(parts, geometry), first, last, begin, end, out, status)


def rows(
    queue: Queue,
    parts: Sequence[Part],
    geometry: Df11Geometry,
    first: int,
    cols: int,
    rows: int,
    ids: int,
    id_bytes: int,
    count: int,
    out: int,
    status: int = 0,
) -> None:
    """Decode rows of the matrix [rows, cols] that begins at weight ``first``, as BF16 to ``out`` [count, cols].

    ids: address of ``count`` signed integers of ``id_bytes`` 4 or 8. An id outside the matrix gives a row of zeros and
    sets bit 1 of the status. Raises UsageError for a matrix beyond the unit, CorruptTensorError for parts of other
    lengths.
    """
    _check(parts, geometry)
    if min(first, cols, rows, count) < 0 or first + rows * cols > geometry.elements:
        raise UsageError(
            f"expected a matrix within the unit's {geometry.elements} weights, got [{rows}, {cols}] from {first}"
        )
    if id_bytes not in (4, 8):
        raise UsageError(f"expected ids of 4 or 8 bytes, got {id_bytes}")
    if count == 0 or cols == 0:
        return
    config = rows_config(geometry, count, queue.properties)
    queue.launch(
        ROWS, config, *_unit(parts, geometry), first, cols, rows, ids, id_bytes, count, out, status
    )  # fmt: skip


def decode_config(geometry: Df11Geometry, blocks: int, properties: DeviceProperties) -> LaunchConfig:
    """For blocks of the stream: as many blocks of threads as run at once, each with the same share."""
    resident = _resident(geometry, properties)
    shares = -(-blocks // resident)
    return LaunchConfig.linear(-(-blocks // shares), THREADS, geometry.shared_bytes)


def rows_config(geometry: Df11Geometry, count: int, properties: DeviceProperties) -> LaunchConfig:
    """For rows: as many blocks of threads as run at once, at most one per row."""
    grid = min(count, _resident(geometry, properties))
    return LaunchConfig.linear(grid, THREADS, geometry.shared_bytes)


def _resident(geometry: Df11Geometry, properties: DeviceProperties) -> int:
    per_block = geometry.shared_bytes + _RESERVED_SHARED
    by_shared = (properties.shared_bytes_per_block + _RESERVED_SHARED) // per_block
    return properties.multiprocessors * max(1, min(by_shared, _RESIDENT))


def _check(parts: Sequence[Part], geometry: Df11Geometry) -> None:
    got = tuple(nbytes for _, nbytes in parts)
    if got != geometry.part_bytes:
        raise CorruptTensorError(
            f"expected parts {', '.join(PARTS)} of {geometry.part_bytes} bytes, got {got}: parts of different units"
        )


def _unit(parts: Sequence[Part], geometry: Df11Geometry) -> tuple[int, ...]:
    """The kernels' parameters that describe the unit."""
    (tables, _), (stream, _), (sign_mantissa, _), (index, _) = parts
    gaps = index + HEADER_BYTES
    return (
        tables, stream, sign_mantissa, gaps, gaps + GAP_BYTES * geometry.blocks, geometry.blocks, geometry.elements,
        geometry.stream_bytes // 4, geometry.table_rows, geometry.shortest, geometry.slot_words, geometry.block_symbols,
    )  # fmt: skip
