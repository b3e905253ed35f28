"""Decoding of tiles on the GPU: a range of rows, or rows by id. Both only enqueue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from bitforbit.cuda.kernel import U32, U64, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.queue import Queue
from bitforbit.cuda.tiles.kinds import KINDS, Kind
from bitforbit.cuda.tiles.layout import ALIGNMENT, HEADER_BYTES, TILE_ROWS, TileLayout
from bitforbit.errors import CorruptTensorError, UsageError

_RANGE = (Pointer, Pointer, U64, Pointer, Pointer, Pointer, U32, U32, U32, U32, U32, U32)
_IDS = (Pointer, Pointer, U64, Pointer, Pointer, Pointer, U32, U64, Pointer, U32, U32, Pointer)


@dataclass(frozen=True)
class Kernels:
    """Of a kind of weights."""

    decode: Kernel
    decode_any: Kernel
    """For rows of any length."""
    rows: Kernel


def _kernels(kind: Kind) -> Kernels:
    return Kernels(
        Kernel("tiles_decode", "tiles_decode.cu", _RANGE, kind.defines),
        Kernel("tiles_decode_any", "tiles_decode.cu", _RANGE, kind.defines),
        Kernel("tiles_rows", "tiles_rows.cu", _IDS, kind.defines),
    )


BY_KIND = {kind: _kernels(kind) for kind in KINDS}
KERNELS = tuple(kernel for kernels in BY_KIND.values() for kernel in vars(kernels).values())

THREADS = 256
WARPS = THREADS // 32
WIDE_STORE = 8
"""Weights of the widest store: rows of a multiple of them begin on its boundary."""
LONGEST_RUN = 8
WARPS_PER_MULTIPROCESSOR = 40
"""That fit at 48 registers per thread."""
TILES_PER_ROW_WARP = 8
GRID_LIMIT = (1 << 31) - 1

Parts = Sequence[tuple[int, int]]


def run_tiles(layout: TileLayout, stripes: int, properties: DeviceProperties) -> int:
    """How many tiles, side by side, a warp decodes: more for a matrix that keeps all warps busy anyway."""
    warps = properties.multiprocessors * WARPS_PER_MULTIPROCESSOR
    return max(1, min(LONGEST_RUN, layout.tiles_per_stripe, -(-stripes * layout.tiles_per_stripe // warps)))


@dataclass(frozen=True)
class DecodePlan:
    """A launch for a range of rows."""

    kernel: Kernel
    config: LaunchConfig
    run_tiles: int
    runs_per_stripe: int
    runs: int


@lru_cache(maxsize=4096)
def decode_plan(layout: TileLayout, begin: int, end: int, properties: DeviceProperties) -> DecodePlan:
    """Launch for rows [begin, end), at least one. Raises UsageError for rows outside the matrix."""
    layout.check_size()
    if not 0 <= begin < end <= layout.rows:
        raise UsageError(f"expected rows within 0 to {layout.rows}, got [{begin}, {end})")
    stripes = (end - 1) // TILE_ROWS - begin // TILE_ROWS + 1
    run = run_tiles(layout, stripes, properties)
    runs_per_stripe = -(-layout.tiles_per_stripe // run)
    runs = stripes * runs_per_stripe
    kernels = BY_KIND[layout.kind]
    kernel = kernels.decode if layout.cols % WIDE_STORE == 0 else kernels.decode_any
    return DecodePlan(kernel, LaunchConfig.linear(-(-runs // WARPS), THREADS), run, runs_per_stripe, runs)


@lru_cache(maxsize=4096)
def rows_config(layout: TileLayout, count: int) -> LaunchConfig:
    """Launch for so many rows by id, at least one: a warp takes 8 tiles' worth of a row."""
    layout.check_size()
    blocks = -(-count * -(-layout.tiles_per_stripe // TILES_PER_ROW_WARP) // WARPS)
    if not 0 < blocks <= GRID_LIMIT:
        raise UsageError(f"expected 1 to {GRID_LIMIT} blocks of rows in a launch, got {blocks}: look up fewer at once")
    return LaunchConfig.linear(blocks, THREADS)


def decode(queue: Queue, parts: Parts, layout: TileLayout, begin: int, end: int, out: int) -> None:
    """Decode rows [begin, end) to ``out``, plain weights [end - begin, cols] in device memory.

    ``parts``: address and bytes of tiles, escapes, offsets, header; addresses are multiples of 16, as is ``out``.
    Raises UsageError for rows outside the matrix and other alignments, CorruptTensorError for parts of wrong lengths.
    Parts of right lengths that are damaged give wrong weights, and no access outside of them.
    """
    check_parts(parts, layout, out)
    if begin == end and 0 <= begin <= layout.rows:
        return
    plan = decode_plan(layout, begin, end, queue.properties)
    (tiles, _), (escapes, escapes_bytes), (offsets, _), (header, _) = parts
    queue.launch(
        plan.kernel, plan.config, tiles, escapes, escapes_bytes, offsets, header, out,
        layout.cols, begin, end - begin, plan.run_tiles, plan.runs_per_stripe, plan.runs,
    )  # fmt: skip


def rows(
    queue: Queue, parts: Parts, layout: TileLayout, ids: int, id_bytes: int, count: int, out: int, status: int = 0
) -> None:
    """Decode the rows of ``count`` ids to ``out``, plain weights [count, cols] in device memory.

    ``ids``: address of int32 (``id_bytes`` 4) or int64 (8) in device memory. An id outside the matrix gives a row of
    zeros and sets bit 2 of the u32 at ``status`` (0: nowhere). Parts and errors as for :func:`decode`.
    """
    check_parts(parts, layout, out)
    if id_bytes not in (4, 8):
        raise UsageError(f"expected ids of 4 or 8 bytes, got {id_bytes}")
    if count == 0:
        return
    (tiles, _), (escapes, escapes_bytes), (offsets, _), (header, _) = parts
    queue.launch(
        BY_KIND[layout.kind].rows, rows_config(layout, count), tiles, escapes, escapes_bytes, offsets, header, ids,
        id_bytes, count, out, layout.rows, layout.cols, status,
    )  # fmt: skip


def check_parts(parts: Parts, layout: TileLayout, out: int) -> None:
    """Raise CorruptTensorError unless the parts have the lengths of the layout, UsageError unless all are aligned."""
    (at_tiles, tiles), (at_escapes, escapes), (at_offsets, offsets), (at_header, header) = parts
    if (at_tiles | at_escapes | at_offsets | at_header | out) % ALIGNMENT:
        raise UsageError(
            f"expected addresses of parts and output that are multiples of {ALIGNMENT}, "
            f"got {[hex(at) for at, _ in parts]}, {out:#x}"
        )
    expected = _expected_bytes(layout)
    if (tiles, offsets, header) != expected:
        raise CorruptTensorError(
            f"expected {expected} bytes in parts tiles, offsets, header of a [{layout.rows}, {layout.cols}] matrix of "
            f"{layout.kind.name}, "
            f"got {(tiles, offsets, header)}"
        )
    if escapes < ALIGNMENT or escapes % ALIGNMENT:
        raise CorruptTensorError(f"expected a multiple of {ALIGNMENT} bytes in part escapes, got {escapes}")


@lru_cache(maxsize=4096)
def _expected_bytes(layout: TileLayout) -> tuple[int, int, int]:
    return layout.tiles_bytes, layout.offsets_bytes, HEADER_BYTES
