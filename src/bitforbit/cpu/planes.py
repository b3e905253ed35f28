"""The ``planes`` kernels of the native library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitforbit.cpu import _native
from bitforbit.cpu.isa import active
from bitforbit.errors import CorruptTensorError

Bytes = npt.NDArray[np.uint8]


def empty(nbytes: int) -> Bytes:
    """Uninitialized bytes on a 64-byte boundary, which the kernels fill fastest."""
    return _native.empty_aligned(nbytes)


def is_widened_bf16(data: Bytes) -> bool:
    """Whether F32 data has zeros in the low 16 bits of every element."""
    return _native.is_widened_bf16(data)


def exponent_histogram(data: Bytes, kind: str) -> npt.NDArray[np.uint64]:
    """Count of every exponent value, ``[256]``, in data of that float kind."""
    return np.array(_native.exponent_histogram(data, kind, False), np.uint64)


@dataclass(frozen=True)
class HistogramPlan:
    """What an encoder counts to choose code tables, so that each makes the same choice.

    Histogram i covers ``rows`` rows from row ``i * rows`` on. It looks at one in ``stride`` chunks of 64 columns: in
    row r at the chunks c with c % stride == r % stride. The last one, of the rows that are left, has ``last_stride``.
    """

    rows: int
    count: int
    stride: int
    last_stride: int


def plan_histograms(rows: int, cols: int, rows_per_table: int) -> HistogramPlan:
    """What is to be counted of a matrix; ``rows_per_table`` 0 leaves the choice to the encoder."""
    return HistogramPlan(*_native.planes_plan_histograms(rows, cols, rows_per_table))


def choose_tables(counts: npt.NDArray[np.uint32], rows: int, cols: int, rows_per_table: int) -> tuple[int, Bytes]:
    """Rows per table and the tables, ``[tables * 16]``, by histograms ``[count, 256]`` that follow the plan."""
    return _native.planes_choose_tables(counts, rows, cols, rows_per_table)


def encode(
    data: Bytes, kind: str, wide: bool, rows: int, cols: int, rows_per_table: int, threads: int
) -> tuple[int, dict[str, Bytes]]:
    """Encode a matrix; ``rows_per_table`` 0 lets the encoder choose. Returns (rows_per_table, parts)."""
    chosen, code, digits, sign_mantissa, tails = _native.planes_encode(
        data, kind, wide, rows, cols, rows_per_table, active(), threads
    )
    return chosen, {"code": code, "digits": digits, "sign_mantissa": sign_mantissa, "tails": tails}


def decode(
    parts: dict[str, Bytes],
    kind: str,
    wide: bool,
    shape: tuple[int, int, int],
    rows: tuple[int, int],
    out: Bytes,
    threads: int,
) -> None:
    """Decode rows [begin, end) of a matrix. shape is (rows, cols, rows_per_table). Raises CorruptTensorError."""
    try:
        _native.planes_decode(
            parts["code"], parts["digits"], parts["sign_mantissa"], parts["tails"],
            kind, wide, *shape, *rows, out, active(), threads,
        )  # fmt: skip
    except _native.CorruptData as error:
        raise CorruptTensorError(str(error)) from None
