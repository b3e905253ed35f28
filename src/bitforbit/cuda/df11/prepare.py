"""A DFloat11 unit's tensors to the parts that the kernels read. On the host, once per unit, when it is loaded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11 import Df11Unit, check_unit
from bitforbit.codecs.df11.unit import MAX_EXPONENT
from bitforbit.cuda.df11.geometry import LOOKUP_BITS, LOOKUP_SYMBOLS, Df11Geometry, index_part, padded
from bitforbit.errors import Df11FormatError

U8 = npt.NDArray[np.uint8]

_WALKED_BITS = 16
"""Codes that a look-up holds end within two levels of the stored tables."""

_LONG = 0x80
_COUNT_SHIFT = 11
_ENDS_SHIFT = 19


def prepare(
    luts: U8, encoded_exponent: U8, sign_mantissa: U8, output_positions: U8, gaps: U8
) -> tuple[Df11Geometry, dict[str, U8]]:
    """The parts of a unit, as host arrays, from its tensors as stored (Df11Unit gives their shapes).

    Parts may share memory with the tensors. Raises Df11LutError, Df11PositionsError or Df11FormatError for tensors that
    contradict each other; whether the stream fits them shows only when it is decoded.
    """
    unit = Df11Unit(luts, encoded_exponent, sign_mantissa, output_positions, gaps, np.empty(0, np.int64))
    positions = check_unit(unit)
    if unit.num_weights == 0 or unit.num_blocks == 0:
        raise Df11FormatError(
            f"expected a unit of at least one weight, got {unit.num_weights} weights in {encoded_exponent.size} bytes"
        )
    if gaps[0] >> 3 != 0:  # [7:3] the first window's gap
        raise Df11FormatError(f"expected the first code at bit 0 of the stream, got bit {gaps[0] >> 3}")
    lengths = luts[-1][luts[-1] > 0]
    geometry = Df11Geometry(
        elements=unit.num_weights,
        blocks=unit.num_blocks,
        stream_bytes=padded(encoded_exponent.size),
        table_rows=luts.shape[0],
        shortest=int(lengths.min()),
        block_symbols=int(np.diff(positions.astype(np.int64)).max()),
        positions=positions,
    )
    parts = {
        "tables": np.concatenate([lookups(luts).view(np.uint8).reshape(-1), luts.reshape(-1)]),
        "stream": _pad(encoded_exponent),
        "sign_mantissa": _pad(sign_mantissa),
        "index": index_part(geometry, np.ascontiguousarray(gaps)),
    }
    return geometry, parts


def lookups(luts: U8) -> npt.NDArray[np.uint32]:
    """For every 11 bits the state's step and up to four exponents: ``[2048, 2]``.

    A look-up holds as many codes as its bits show in full, whatever follows them.
    """
    codes = _first_codes(luts)
    index = np.arange(1 << LOOKUP_BITS, dtype=np.uint32)
    left = np.full(index.size, LOOKUP_BITS, np.uint32)
    count, ends, symbols = np.zeros((3, index.size), np.uint32)
    for _ in range(LOOKUP_SYMBOLS):
        # The bits that are left stand behind a leading 1.
        code = codes[(np.uint32(1) << left) | (index & ((np.uint32(1) << left) - 1))]
        found = code > 0
        symbols |= np.where(found, code & 0xFF, 0) << (8 * count)
        left -= code >> 8
        count += found
        ends |= np.where(found, np.uint32(1) << (LOOKUP_BITS - left), 0).astype(np.uint32)
    steps = LOOKUP_BITS - left | count << _COUNT_SHIFT | ends << _ENDS_SHIFT
    steps[count == 0] = _LONG
    return np.stack([steps, symbols], axis=1).astype("<u4")


def _first_codes(luts: U8) -> npt.NDArray[np.uint32]:
    """The code that bits begin with, if they are enough to tell: exponent | length << 8, else 0.

    ``[2^12]``; bits are given behind a leading 1.
    """
    tables, lengths = luts[:-1].astype(np.uint32), luts[-1].astype(np.uint32)
    bits = np.arange(1 << _WALKED_BITS)
    value = tables[0][bits >> 8]
    pointer = value > MAX_EXPONENT
    second = np.minimum(np.where(pointer, 256 - value, 0), len(tables) - 1)
    value = np.where(pointer, tables[second, bits & 0xFF], value)
    length = np.where(value > MAX_EXPONENT, 0, lengths[value])
    good = (length > np.where(pointer, 8, 0)) & (length <= np.where(pointer, 16, 8))
    walked = np.where(good, value | length << 8, 0).astype(np.uint32)

    first = np.zeros(2 << LOOKUP_BITS, np.uint32)
    for known in range(1, LOOKUP_BITS + 1):
        candidates = walked.reshape(1 << known, -1)
        code = candidates[:, 0]
        sure = (candidates == code[:, None]).all(axis=1) & (code >> 8 <= known)
        first[1 << known : 2 << known] = np.where(sure, code, 0)
    return first


def _pad(array: U8) -> U8:
    missing = padded(array.size) - array.size
    return np.pad(array, (0, missing)) if missing else np.ascontiguousarray(array)
