"""The ``planes`` kernels of the native library."""

from __future__ import annotations

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
