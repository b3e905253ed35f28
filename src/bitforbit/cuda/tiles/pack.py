"""Packing of matrices into tiles on the GPU. For preparations: the host waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.kernel import U32, U64, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.queue import Buffer, Queue
from bitforbit.cuda.tiles.kinds import BF16, KINDS, WINDOW, Kind
from bitforbit.cuda.tiles.layout import (
    HEADER_BASE,
    HEADER_BYTES,
    HEADER_ENTRIES,
    NARROW_BYTES,
    NARROW_EXPONENTS,
    WIDE_BYTES,
    TileLayout,
)
from bitforbit.errors import UsageError


@dataclass(frozen=True)
class Kernels:
    """Of a kind of weights."""

    histogram: Kernel
    count: Kernel
    write: Kernel


_WRITE = (Pointer, U32, U32, U32, U32, Pointer, U32, Pointer, Pointer, Pointer, U32)


def _kernels(kind: Kind) -> Kernels:
    return Kernels(
        Kernel("tiles_histogram", "tiles_pack.cu", (Pointer, U64, Pointer), kind.defines),
        Kernel("tiles_count", "tiles_pack.cu", (Pointer, U32, U32, U32, U32, Pointer), kind.defines),
        Kernel("tiles_write", "tiles_pack.cu", _WRITE, kind.defines),
    )


BY_KIND = {kind: _kernels(kind) for kind in KINDS}
CHUNK_SUMS = Kernel("tiles_chunk_sums", "tiles_scan.cu", (Pointer, U32, Pointer))
SCAN_SUMS = Kernel("tiles_scan_sums", "tiles_scan.cu", (Pointer, U32))
SCAN = Kernel("tiles_scan", "tiles_scan.cu", (Pointer, U32, Pointer))
KERNELS = (*(k for kernels in BY_KIND.values() for k in vars(kernels).values()), CHUNK_SUMS, SCAN_SUMS, SCAN)

THREADS = 256
WARPS = THREADS // 32
CHUNK = 4096
"""Counts that one block of the running sum takes."""
EXPONENTS = 256
_HISTOGRAM_BLOCKS = 8
_LARGEST_BIN = 1 << 31
ENTRY_LIMIT = (1 << 32) - 1


@dataclass(frozen=True)
class Window:
    """What the host chooses from the numbers of weights of each exponent."""

    base: int
    """First of the 8 exponents that have codes."""
    escaped: tuple[int, ...]
    """Exponents outside that occur, ascending."""
    entries: int
    """Weights that have them."""

    @property
    def entry_bytes(self) -> int:
        """Bytes of an escape's entry."""
        return NARROW_BYTES if len(self.escaped) <= NARROW_EXPONENTS else WIDE_BYTES

    @classmethod
    def choose(cls, histogram: list[int], kind: Kind = BF16) -> Window:
        """The lowest of the windows with the fewest escapes, for 256 numbers of weights."""
        inside = [sum(histogram[base : base + WINDOW]) for base in range(kind.max_base + 1)]
        base = inside.index(max(inside))
        escaped = [e for e in range(EXPONENTS) if histogram[e] and not base <= e < base + WINDOW]
        return cls(base, tuple(escaped), sum(histogram) - max(inside))

    def header(self) -> Bytes:
        """The part ``header``."""
        header = np.zeros(HEADER_BYTES, np.uint8)
        if self.entry_bytes == NARROW_BYTES:
            header[: len(self.escaped)] = self.escaped
        header[HEADER_BASE : HEADER_ENTRIES + 4].view("<u4")[:] = self.base, self.entry_bytes, self.entries
        return header

    def ranks(self) -> Bytes:
        """For each exponent its index among the escaped ones; 0 for the others."""
        ranks = np.zeros(EXPONENTS, np.uint8)
        ranks[list(self.escaped)] = range(len(self.escaped))
        return ranks


def histogram_config(weights: int, properties: DeviceProperties) -> LaunchConfig:
    """Launch that counts exponents: a block counts less than 2^32 weights, and no block is there for nothing."""
    blocks = min(-(-weights // (8 * THREADS)), properties.multiprocessors * _HISTOGRAM_BLOCKS)
    return LaunchConfig.linear(max(blocks, -(-weights // _LARGEST_BIN)), THREADS)


def tile_config(layout: TileLayout) -> LaunchConfig:
    """Launch with a warp per tile."""
    return LaunchConfig.linear(-(-layout.tiles // WARPS), THREADS)


def pack(queue: Queue, data: int, rows: int, cols: int, kind: Kind = BF16) -> dict[str, Buffer] | None:
    """Pack weights [rows, cols] at the address ``data`` (on their own size) into the four parts; None if not smaller.

    The bytes are those of :func:`bitforbit.cuda.tiles.naive.pack`. Raises UsageError for a matrix without weights, or
    with 2^31 or more rows, columns or tiles.
    """
    if rows < 1 or cols < 1:
        raise UsageError(f"expected a matrix with at least one row and one column, got [{rows}, {cols}]")
    layout = TileLayout(rows, cols, kind)
    layout.check_size()
    kernels = BY_KIND[kind]
    bins = queue.zeros(8 * EXPONENTS)
    queue.launch(kernels.histogram, histogram_config(rows * cols, queue.properties), data, rows * cols, bins.address)
    window = Window.choose(np.frombuffer(queue.download(bins), "<u8").tolist(), kind)
    if layout.nbytes(window.entries, window.entry_bytes) >= layout.matrix_bytes:
        return None
    if window.entries > ENTRY_LIMIT:
        raise UsageError(f"expected at most {ENTRY_LIMIT} weights outside the window, got {window.entries}")

    offsets = queue.zeros(layout.offsets_bytes)
    config = tile_config(layout)
    queue.launch(kernels.count, config, data, rows, cols, layout.tiles, window.base, offsets.address)
    running_sum(queue, offsets.address, layout.tiles)
    tiles = queue.empty(layout.tiles_bytes)
    escapes = queue.zeros(layout.escapes_bytes(window.entries, window.entry_bytes))
    ranks = queue.upload(window.ranks().tobytes())
    queue.launch(
        kernels.write, config, data, rows, cols, layout.tiles, window.base, ranks.address, window.entry_bytes,
        offsets.address, tiles.address, escapes.address, window.entries,
    )  # fmt: skip
    header = queue.upload(window.header().tobytes())
    return {"tiles": tiles, "escapes": escapes, "offsets": offsets, "header": header}


def running_sum(queue: Queue, counts: int, count: int) -> None:
    """Replace ``count`` u32 numbers at ``counts`` by the sums of those before, and write the sum of all after them."""
    chunks = -(-count // CHUNK)
    sums = queue.empty(4 * chunks)
    config = LaunchConfig.linear(chunks, THREADS)
    queue.launch(CHUNK_SUMS, config, counts, count, sums.address)
    queue.launch(SCAN_SUMS, LaunchConfig.linear(1, THREADS), sums.address, chunks)
    queue.launch(SCAN, config, counts, count, sums.address)
