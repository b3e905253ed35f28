"""Decoding of the ``planes`` codec: from its four parts in device memory to floats.

Outline (docs/format.md, section 3): which tail digits a weight takes depends on all weights of its 16-row block before
it. :func:`prepare` counts once and leaves in a workspace where the digits of each *chunk* of 128 groups (8192 weights)
begin; with that, :func:`decode` and :func:`rows` give every chunk to a thread block of its own, so that a matrix of few
blocks keeps a GPU busy too, and no digit is read twice but for the one group that two chunks share per level. The
workspace costs 16 bytes per chunk (0.02 bits per weight) and 32 bytes per block.

Limits: rows x (columns + 64) of a block below 2^32, as the format has it; the number of elements is not limited.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitforbit.codecs.planes.layout import BLOCK_ROWS, GROUP, TABLE_BYTES, Layout
from bitforbit.cuda.kernel import U32, U64, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.queue import Queue
from bitforbit.dtypes import FLOAT_LAYOUTS
from bitforbit.errors import CorruptTensorError, UsageError

Parts = Sequence[tuple[int, int]]
"""(address, bytes) of code, digits, sign_mantissa and tails."""

CHUNK_GROUPS = 128
ENTRY_BYTES = 16
START_BYTES = 32
DECODE_THREADS = 128
SCAN_THREADS = 1024
INDEX_THREADS = 256
MAX_GRID_X = (1 << 31) - 1
MAX_GRID_Y = 65535
ALIGNMENT = 16

STARTS = Kernel(
    "planes_starts", "planes_decode_index.cu", (Pointer, U64, U32, U32, U32, U64, Pointer, Pointer)
)  # fmt: skip
INDEX = Kernel(
    "planes_index", "planes_decode_index.cu",
    (Pointer, Pointer, Pointer, U64, Pointer, U64, U64, U32, U32, U32, Pointer, Pointer),
)  # fmt: skip

_SOURCE = (Pointer, Pointer, Pointer, U64, U64, Pointer, U64, Pointer, Pointer, U32, U32, U64, U32, U32)
# (kind, wide) -> BITFORBIT_KIND of the text.
_KINDS = {
    ("BF16", False): "0", ("F16", False): "1", ("F32", False): "2", ("F8_E4M3", False): "3", ("F8_E5M2", False): "4",
    ("BF16", True): "5",
}  # fmt: skip
DECODE = {
    key: Kernel(
        "planes_decode", "planes_decode.cu", (*_SOURCE, U64, U64, U64, Pointer, U32), (("BITFORBIT_KIND", number),)
    )
    for key, number in _KINDS.items()
}
ROWS = {
    key: Kernel(
        "planes_rows", "planes_decode.cu", (*_SOURCE, Pointer, U32, U64, Pointer, U32, Pointer),
        (("BITFORBIT_KIND", number),),
    )
    for key, number in _KINDS.items()
}  # fmt: skip
KERNELS: tuple[Kernel, ...] = (STARTS, INDEX, *DECODE.values(), *ROWS.values())


def chunks_per_block(layout: Layout) -> int:
    """Chunks of a whole block; a short last block is counted alike."""
    return -(-layout.groups_in(BLOCK_ROWS) // CHUNK_GROUPS)


def workspace_bytes(layout: Layout) -> int:
    """Bytes that :func:`prepare` fills. Raises UsageError for a matrix that this codec's kernels cannot index."""
    _check(layout)
    return _starts_bytes(layout) + layout.blocks * (chunks_per_block(layout) + 1) * ENTRY_BYTES


def decode_config(layout: Layout, blocks: int, properties: DeviceProperties) -> LaunchConfig:
    """Launch of a decode kernel for that many blocks (or rows by id), at most 65,535."""
    return LaunchConfig((chunks_per_block(layout), blocks, 1), (DECODE_THREADS, 1, 1))


def index_config(blocks: int, properties: DeviceProperties) -> LaunchConfig:
    """Launch of ``planes_index`` for that many blocks, at most 2^31 - 1."""
    return LaunchConfig.linear(blocks, INDEX_THREADS)


def prepare(queue: Queue, parts: Parts, layout: Layout, workspace: int, status: int = 0) -> None:
    """Fill the workspace, ``workspace_bytes(layout)`` bytes, for these parts; all of them on 16-byte boundaries.

    Digits and tails that contradict each other set bit 0 of the u32 at ``status``. Raises CorruptTensorError for parts
    of other lengths than the layout's, UsageError for addresses that are not aligned.
    """
    (code, _), (digits, _), _, (tails, tails_bytes) = _checked(parts, layout, workspace)
    counts = code + layout.tables * TABLE_BYTES
    groups, last = layout.groups_in(BLOCK_ROWS), layout.groups_in(layout.block_rows(layout.blocks - 1))
    blocks_per_table = min(layout.rows_per_table // BLOCK_ROWS, (1 << 32) - 1)
    queue.launch(
        STARTS, LaunchConfig.linear(1, SCAN_THREADS),
        counts, layout.blocks, groups, last, blocks_per_table, tails_bytes, workspace, status,
    )  # fmt: skip
    index = workspace + _starts_bytes(layout)
    for first in range(0, layout.blocks, MAX_GRID_X):
        blocks = min(MAX_GRID_X, layout.blocks - first)
        queue.launch(
            INDEX, index_config(blocks, queue.properties),
            counts, digits, tails, tails_bytes // 4, workspace, first, layout.blocks, groups, last,
            chunks_per_block(layout), index, status,
        )  # fmt: skip


def decode(
    queue: Queue, parts: Parts, layout: Layout, wide: bool, begin: int, end: int, out: int, workspace: int,
    status: int = 0,
) -> None:  # fmt: skip
    """Rows [begin, end) to ``out``, ``[end - begin, cols]``; ``wide``: BF16 codes as F32.

    Fastest where every row of ``out`` is on a 16-byte boundary.

    The workspace must have been prepared. Damage is found there, by :func:`prepare`: what contradictory parts decode to
    is undefined, but no memory besides the output is written and none besides parts and workspace is read.
    """
    if not 0 <= begin <= end <= layout.rows:
        raise UsageError(f"expected rows within 0 to {layout.rows}, got {begin} to {end}")
    source = _source(parts, layout, workspace)
    kernel = DECODE[_kind(layout, wide)]
    unit = _unit(layout, wide, out)
    if begin == end:
        return
    last = -(-end // BLOCK_ROWS)
    for first in range(begin // BLOCK_ROWS, last, MAX_GRID_Y):
        config = decode_config(layout, min(MAX_GRID_Y, last - first), queue.properties)
        queue.launch(kernel, config, *source, first, begin, end, out, unit)


def rows(
    queue: Queue, parts: Parts, layout: Layout, wide: bool, ids: int, id_bytes: int, count: int, out: int,
    workspace: int, status: int = 0,
) -> None:  # fmt: skip
    """Rows by id to ``out``, ``[count, cols]``. ids: ``[count]`` int32 or int64 (id_bytes 4, 8).

    An id outside of the matrix gives a row of zeros and sets bit 1 of the u32 at ``status``. The workspace must have
    been prepared.
    """
    if id_bytes not in (4, 8):
        raise UsageError(f"expected ids of 4 or 8 bytes, got {id_bytes}")
    source = _source(parts, layout, workspace)
    kernel = ROWS[_kind(layout, wide)]
    unit = _unit(layout, wide, out)
    for first in range(0, count, MAX_GRID_Y):
        config = decode_config(layout, min(MAX_GRID_Y, count - first), queue.properties)
        queue.launch(kernel, config, *source, ids, id_bytes, first, out, unit, status)


def _check(layout: Layout) -> None:
    if min(layout.rows, BLOCK_ROWS) * (layout.cols + GROUP) >= 1 << 32:
        raise CorruptTensorError(
            f"expected rows * (columns + {GROUP}) of a block below 2^32, got {layout.rows} x {layout.cols}"
        )


def _starts_bytes(layout: Layout) -> int:
    return layout.blocks * START_BYTES


def _checked(parts: Parts, layout: Layout, workspace: int) -> Parts:
    _check(layout)
    expected = layout.part_bytes(parts[3][1])
    for (name, nbytes), (address, got) in zip(expected.items(), parts, strict=True):
        if got != nbytes:
            raise CorruptTensorError(f"expected part {name!r} to have {nbytes} bytes, got {got}")
        _aligned(f"part {name!r}", address)
    _aligned("the workspace", workspace)
    return parts


def _aligned(what: str, address: int) -> None:
    if address % ALIGNMENT:
        raise UsageError(f"expected {what} on a {ALIGNMENT}-byte boundary, got address {address:#x}")


def _source(parts: Parts, layout: Layout, workspace: int) -> tuple[int, ...]:
    (code, _), (digits, _), (planes, _), (tails, tails_bytes) = _checked(parts, layout, workspace)
    plane_bytes = (*layout.plane_bytes, 0, 0)
    index, last_rows = workspace + _starts_bytes(layout), layout.block_rows(layout.blocks - 1)
    geometry = (
        layout.cols, layout.groups_in(BLOCK_ROWS), layout.blocks, last_rows, layout.groups_in(last_rows),
    )  # fmt: skip
    return (
        code, digits, planes, plane_bytes[0], plane_bytes[0] + plane_bytes[1], tails, tails_bytes // 4,
        workspace, index, *geometry,
    )  # fmt: skip


def _kind(layout: Layout, wide: bool) -> tuple[str, bool]:
    if (layout.kind, wide) not in _KINDS:
        raise UsageError(f"expected only BF16 codes to be widened, got {layout.kind}")
    return layout.kind, wide


def _unit(layout: Layout, wide: bool, out: int) -> int:
    """The largest power of two, at most 16, that divides the address of every row of the output."""
    itemsize = 4 if wide else FLOAT_LAYOUTS[layout.kind].itemsize
    bits = 16 | layout.cols * itemsize | out
    unit = bits & -bits
    if unit < itemsize:
        raise UsageError(f"expected the output on a boundary of its {itemsize}-byte elements, got address {out:#x}")
    return unit
