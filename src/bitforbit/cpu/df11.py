"""Typed access to the native DFloat11 routines. They release the interpreter's lock and run on several threads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitforbit.cpu import _native
from bitforbit.errors import Df11FormatError

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

CHUNK_ELEMENTS = 1 << 16
"""Weights per unit of work of the encoder."""


def split_and_count(words: U16, sign_mantissa: U8, threads: int) -> U32:
    """Split BF16 words ``[n]``: fills ``sign_mantissa`` ``[n]``, returns exponent counts ``[chunks, 256]``."""
    chunks = -(-words.size // CHUNK_ELEMENTS)
    histograms = np.empty((chunks, 256), np.uint32)
    _native.df11_split_and_count(words, CHUNK_ELEMENTS, threads, sign_mantissa, histograms.reshape(-1))
    return histograms


def encode(
    words: U16,
    chunk_bits: U64,
    first_element: int,
    codes: U32,
    lengths: U8,
    windows: U64,
    gaps: U8,
    positions: U32,
    threads: int,
) -> None:
    """Write the codes of all exponents of ``words`` ``[n]`` into the big-endian 64-bit ``windows`` of a stream.

    ``chunk_bits`` ``[chunks]`` is the stream offset in bits of each chunk; ``codes`` and ``lengths`` are ``[256]``.
    ``gaps`` ``[windows]`` gets the offset of the first code in each window that begins in these words, ``positions``
    ``[windows / 512 + 1]`` the first element of each such block.
    """
    _native.df11_encode(
        words, CHUNK_ELEMENTS, chunk_bits, first_element, codes, lengths, threads, windows, gaps, positions
    )


def pack_gaps(gaps: U8) -> U8:
    """Pack 5-bit values ``[8 m]`` into ``[5 m]`` bytes, the first value in the most significant bits."""
    packed = np.empty(gaps.size // 8 * 5, np.uint8)
    _native.df11_pack_gaps(gaps, packed)
    return packed


def decode(luts: U8, encoded: U8, sign_mantissa: U8, positions: U32, gaps: U8, words: U16, threads: int) -> None:
    """Decode a unit into ``words`` ``[n]``. ``positions`` is ``[blocks + 1]``; ``luts`` has been validated.

    Raises Df11FormatError where stream, positions and gaps contradict each other.
    """
    try:
        _native.df11_decode(luts.reshape(-1), encoded, sign_mantissa, positions, gaps, threads, words)
    except _native.CorruptData as e:
        raise Df11FormatError(f"DF11 stream contradicts its index: {e}; the file is damaged") from None
