"""Encoding a matrix in device memory in the ``planes`` format: the bytes that the CPU encoder gives.

Outline: the device counts the exponents that the native library's plan asks for; the library chooses the code tables;
the device counts what each 16-row block leaves to the tail; the host adds that up to where each tail begins; the
device writes the parts. The data is read twice, and twice the host waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.codecs.planes.codec import RECORD_BYTES
from bitforbit.codecs.planes.layout import BLOCK_ROWS, GROUP, MAX_ELEMENTS, PLANE_WIDTHS, Layout
from bitforbit.cpu import planes as native
from bitforbit.cuda.kernel import U32, U64, DeviceProperties, Kernel, LaunchConfig, Pointer
from bitforbit.cuda.queue import Buffer, Queue
from bitforbit.errors import UsageError

SOURCE = "planes_encode.cu"
THREADS = 256

MAX_ROWS = 1 << 34
"""A thread block encodes 16 rows, and a grid has fewer than 2^31 of them."""

KINDS: dict[tuple[str, bool], str] = {
    ("BF16", False): "kBF16",
    ("BF16", True): "kBF16",
    ("F16", False): "kF16",
    ("F32", False): "kF32",
    ("F8_E4M3", False): "kF8E4M3",
    ("F8_E5M2", False): "kF8E5M2",
}
"""Kinds, with whether they are kept widened to F32, and their names in the kernels."""

_MATRIX = (Pointer, U64, U64, U32)  # data, bytes from row to row, rows, columns


def _kernels(name: str, *parameters: type[Any]) -> dict[tuple[str, bool], Kernel]:
    def defines(constant: str, wide: bool) -> tuple[tuple[str, str], ...]:
        return ("BITFORBIT_KIND", constant), ("BITFORBIT_WIDE", str(int(wide)))

    return {key: Kernel(name, SOURCE, (*_MATRIX, *parameters), defines(KINDS[key], key[1])) for key in KINDS}


HISTOGRAMS = _kernels("planes_histograms", U64, U64, U64, Pointer)
COUNT = _kernels("planes_count", U64, Pointer, Pointer)
WRITE = _kernels("planes_write", U64, Pointer, Pointer, Pointer, Pointer, Pointer)
WIDENED = Kernel("planes_widened", "planes_encode_widened.cu", (Pointer, U64, U64, U64, Pointer))

KERNELS: tuple[Kernel, ...] = (*HISTOGRAMS.values(), *COUNT.values(), *WRITE.values(), WIDENED)


def histograms_config(histograms: int, properties: DeviceProperties) -> LaunchConfig:
    """A thread block per histogram."""
    return LaunchConfig.linear(histograms, THREADS)


def blocks_config(layout: Layout, properties: DeviceProperties) -> LaunchConfig:
    """A thread block per block of 16 rows: its digits have one order, so it is walked by one."""
    return LaunchConfig.linear(layout.blocks, THREADS)


def widened_config(rows: int, cols: int, properties: DeviceProperties) -> LaunchConfig:
    """Enough thread blocks for every multiprocessor, along the columns where rows are few."""
    wanted = 16 * properties.multiprocessors
    along_cols = min(-(-cols // THREADS), wanted)
    return LaunchConfig((along_cols, min(rows, max(1, wanted // along_cols)), 1), (THREADS, 1, 1))


@dataclass(frozen=True)
class _Matrix:
    """Where a matrix lies in device memory."""

    data: int
    kind: str
    wide: bool
    rows: int
    cols: int
    row_bytes: int

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return self.data, self.row_bytes, self.rows, self.cols

    @property
    def key(self) -> tuple[str, bool]:
        return self.kind, self.wide


def is_widened_bf16(queue: Queue, data: int, rows: int, cols: int, row_stride: int | None = None) -> bool:
    """Whether all of an F32 matrix ``[rows, cols]`` at ``data`` has zeros in the low 16 bits. Waits for the device.

    ``row_stride``: elements from row to row, if not ``cols``.
    """
    found = queue.zeros(4)
    config = widened_config(rows, cols, queue.properties)
    queue.launch(WIDENED, config, data, cols if row_stride is None else row_stride, rows, cols, found.address)
    return not any(queue.download(found))


def encode(
    queue: Queue,
    data: int,
    kind: str,
    wide: bool,
    rows: int,
    cols: int,
    rows_per_table: int = 0,
    *,
    row_stride: int | None = None,
    always: bool = False,
) -> tuple[int, dict[str, Buffer]] | None:
    """Encode the matrix ``[rows, cols]`` at address ``data``: (rows_per_table, parts), as the CPU encoder does it.

    wide: BF16 kept as F32 whose low 16 bits are zero (see :func:`is_widened_bf16`). rows_per_table 0 leaves the choice
    to the encoder. row_stride: elements from row to row, if not ``cols``: for a range of rows or columns of a larger
    matrix. None where the codec would leave the tensor as it is because coding does not pay, unless ``always``.
    Waits for the device. Raises UsageError.
    """
    if rows * cols == 0 and not always:
        return None
    matrix = _checked(data, kind, wide, rows, cols, row_stride)
    if rows_per_table < 0 or rows_per_table % BLOCK_ROWS:
        raise UsageError(f"expected rows_per_table to be a multiple of {BLOCK_ROWS}, got {rows_per_table}")
    data_bytes = rows * cols * _itemsize(kind, wide)
    too_large = min(rows, BLOCK_ROWS) * (cols + GROUP) >= 1 << 32  # more positions in a block than its counts can state
    if always and too_large:
        raise UsageError(f"expected blocks of 16 rows to have fewer than 2^32 elements, got {cols} columns")
    if not always and (too_large or data_bytes <= RECORD_BYTES):
        return None

    rows_per_table, tables = _choose_tables(queue, matrix, rows_per_table)
    layout = Layout(kind, rows, cols, rows_per_table)
    counts = _count(queue, matrix, layout, tables)
    # Bytes of each block's tail: two levels of digits, 64 of them in 16 bytes, and raw exponents.
    sizes = (counts[:, :2].astype(np.uint64) + 63) // 64 * 16
    ends = np.cumsum(sizes.sum(axis=1) + counts[:, 2], dtype=np.uint64)
    nbytes = layout.part_bytes(int(ends[-1]))
    if not always and sum(nbytes.values()) + RECORD_BYTES >= data_bytes:
        return None

    code = tables.tobytes() + counts.tobytes()
    parts = {"code": queue.upload(code.ljust(nbytes["code"], b"\0"))}
    parts |= {name: queue.empty(nbytes[name]) for name in ("digits", "sign_mantissa", "tails")}
    begins = queue.upload(np.concatenate([np.zeros(1, np.uint64), ends[:-1]]).tobytes())
    queue.launch(
        WRITE[matrix.key], blocks_config(layout, queue.properties), *matrix.arguments, rows_per_table,
        parts["code"].address, begins.address, *(parts[name].address for name in ("digits", "sign_mantissa", "tails")),
    )  # fmt: skip
    return rows_per_table, parts


def _itemsize(kind: str, wide: bool) -> int:
    return 4 if wide else dtypes.FLOAT_LAYOUTS[kind].itemsize


def _checked(data: int, kind: str, wide: bool, rows: int, cols: int, row_stride: int | None) -> _Matrix:
    if (kind, wide) not in KINDS:
        raise UsageError(f"expected a kind among {', '.join(PLANE_WIDTHS)}, widened only BF16, got {kind!r}, {wide=}")
    if not (1 <= rows <= MAX_ROWS and cols >= 1 and rows * cols <= MAX_ELEMENTS):
        raise UsageError(f"expected 1 to {MAX_ROWS} rows and 1 to 2^48 elements, got {rows} rows of {cols}")
    if row_stride is not None and row_stride < cols:
        raise UsageError(f"expected a row stride of at least {cols} elements, got {row_stride}")
    itemsize = _itemsize(kind, wide)
    if data % itemsize:
        raise UsageError(f"expected data on a boundary of its elements' {itemsize} bytes, got address {data:#x}")
    return _Matrix(data, kind, wide, rows, cols, (cols if row_stride is None else row_stride) * itemsize)


def _choose_tables(queue: Queue, matrix: _Matrix, rows_per_table: int) -> tuple[int, npt.NDArray[np.uint8]]:
    """Rows per table and the tables, ``[tables * 16]``."""
    plan = native.plan_histograms(matrix.rows, matrix.cols, rows_per_table)
    histograms = queue.empty(plan.count * 256 * 4)
    queue.launch(
        HISTOGRAMS[matrix.key], histograms_config(plan.count, queue.properties), *matrix.arguments,
        plan.rows, plan.stride, plan.last_stride, histograms.address,
    )  # fmt: skip
    counts = np.frombuffer(queue.download(histograms), "<u4").reshape(-1, 256)
    return native.choose_tables(counts, matrix.rows, matrix.cols, rows_per_table)


def _count(queue: Queue, matrix: _Matrix, layout: Layout, tables: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Level-2 digits, level-3 digits and raw exponents of every block, ``[blocks, 3]``."""
    uploaded, counts = queue.upload(tables.tobytes()), queue.empty(layout.blocks * 12)
    queue.launch(
        COUNT[matrix.key], blocks_config(layout, queue.properties), *matrix.arguments,
        layout.rows_per_table, uploaded.address, counts.address,
    )  # fmt: skip
    return np.frombuffer(queue.download(counts), "<u4").reshape(-1, 3)
