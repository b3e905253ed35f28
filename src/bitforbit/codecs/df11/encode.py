"""DF11 encoder: BF16 matrices to the six arrays of a unit, byte for byte as the reference compressor does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11.codebook import Codebook, build
from bitforbit.codecs.df11.unit import BLOCK_BYTES, MAX_EXPONENT, MAX_STREAM_BYTES, MAX_WEIGHTS, Df11Unit
from bitforbit.cpu import df11 as native
from bitforbit.errors import Df11UnrepresentableError, UnsupportedDtypeError, UsageError

_WINDOW_BITS = 64
_WINDOWS_PER_BLOCK = 512


def encode_unit(matrices: Sequence[npt.NDArray[np.uint16]], *, names: Sequence[str] = (), threads: int = 1) -> Df11Unit:
    """Compress BF16 matrices, given as bit patterns of any shape, into one unit.

    ``names`` are the matrices' names for messages. The result does not depend on ``threads``.

    Raises Df11UnrepresentableError for exponents of 240 and above (magnitudes of 2^113, Inf, NaN) and for units of
    2^32 weights or 2^31 stream bytes and more; UsageError for a unit without weights.
    """
    for matrix in matrices:
        if matrix.dtype != np.uint16:
            raise UnsupportedDtypeError(f"expected BF16 bit patterns as uint16, got {matrix.dtype}; use .view('u2')")
    flat = [np.require(matrix, requirements=["C", "A"]).reshape(-1) for matrix in matrices]
    ends = np.cumsum([words.size for words in flat], dtype=np.int64)
    num_weights = int(ends[-1]) if flat else 0
    if num_weights == 0 or any(words.size == 0 for words in flat):
        raise UsageError("expected matrices of at least one weight each; leave empty ones out of the unit")
    if num_weights > MAX_WEIGHTS:
        raise Df11UnrepresentableError(f"a DF11 unit holds up to {MAX_WEIGHTS} weights, got {num_weights}; split it")
    begins = ends - [words.size for words in flat]

    sign_mantissa = np.empty(num_weights, np.uint8)
    histograms = []
    for i, (words, begin, end) in enumerate(zip(flat, begins, ends, strict=True)):
        histograms.append(native.split_and_count(words, sign_mantissa[begin:end], threads))
        _refuse_large_exponents(histograms[-1], names[i] if i < len(names) else f"matrix {i}")
    book = build(np.sum([h.sum(axis=0, dtype=np.int64) for h in histograms], axis=0))

    chunk_sizes = [h.astype(np.uint64) @ book.lengths.astype(np.uint64) for h in histograms]
    chunk_ends = np.cumsum(np.concatenate(chunk_sizes), dtype=np.uint64)
    chunk_begins = np.split(
        np.concatenate([np.zeros(1, np.uint64), chunk_ends[:-1]]), np.cumsum([c.size for c in chunk_sizes[:-1]])
    )
    num_bits = int(chunk_ends[-1])
    num_bytes = -(-num_bits // 8)
    if num_bytes > MAX_STREAM_BYTES:
        raise Df11UnrepresentableError(f"a DF11 stream has up to {MAX_STREAM_BYTES} bytes, got {num_bytes}; split it")
    num_blocks = -(-num_bytes // BLOCK_BYTES)
    windows = np.zeros(num_blocks * _WINDOWS_PER_BLOCK, np.uint64)
    gaps = np.zeros(windows.size, np.uint8)
    positions = np.zeros(num_blocks + 1, np.uint32)
    for words, begin, chunk_bits in zip(flat, begins, chunk_begins, strict=True):
        native.encode(words, chunk_bits, int(begin), book.codes, book.lengths, windows, gaps, positions, threads)
    stream = windows.view(np.uint8)[:num_bytes]
    last_length = int(book.lengths[(int(flat[-1][-1]) >> 7) & 0xFF])
    started_blocks = _finish(stream, gaps, num_bits, last_length, book)
    positions = np.append(positions[:started_blocks], np.uint32(num_weights))
    return Df11Unit(
        luts=book.luts,
        encoded_exponent=stream,
        sign_mantissa=sign_mantissa,
        output_positions=positions.astype("<u4").view(np.uint8),
        gaps=native.pack_gaps(gaps),
        split_positions=ends[:-1].copy(),
    )


def _refuse_large_exponents(histograms: npt.NDArray[np.uint32], name: str) -> None:
    large = histograms[:, MAX_EXPONENT + 1 :].sum(axis=0, dtype=np.int64)
    if large.any():
        exponent = MAX_EXPONENT + 1 + int(np.flatnonzero(large)[0])
        raise Df11UnrepresentableError(
            f"{name}: DF11 holds exponents 0 to {MAX_EXPONENT}, got {int(large.sum())} weights above, the first with "
            f"exponent {exponent} (magnitude 2^{exponent - 127} or more, Inf or NaN); keep this tensor out of the "
            "units, or use the native format, which holds every value"
        )


def _finish(
    stream: npt.NDArray[np.uint8], gaps: npt.NDArray[np.uint8], num_bits: int, last_length: int, book: Codebook
) -> int:
    """Complete the last byte with the end mark; return the number of blocks in which a code starts.

    The end mark counts as a code, but is written only where the last byte has room. Without it, a window that the
    last code runs into has no start: its gap is 0, and a block that begins with this window has no position.
    """
    window = num_bits // _WINDOW_BITS
    num_blocks = gaps.size // _WINDOWS_PER_BLOCK
    room = -num_bits % 8
    if room:
        bits, length = book.eof
        stream[-1] |= bits >> (length - room) if length >= room else bits << (room - length)
    elif num_bits % _WINDOW_BITS and (num_bits - last_length) // _WINDOW_BITS < window:
        gaps[window] = 0
        if window % _WINDOWS_PER_BLOCK == 0:
            return num_blocks - 1
    return num_blocks
