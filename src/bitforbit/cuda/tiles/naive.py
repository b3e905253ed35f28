"""The tile layout, as plainly as it can be written: the reference for the kernels.

:mod:`bitforbit.cuda.tiles.layout` says what is done here. Arrays have the axes [tile, step, lane, register, half],
so that a tile's weights in C order are in the order of positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.tiles.layout import (
    HEADER_BASE,
    HEADER_BYTES,
    HEADER_ENTRIES,
    MAX_BASE,
    NARROW_BYTES,
    NARROW_EXPONENTS,
    SIGN_MANTISSA_BYTES,
    TILE_BYTES,
    TILE_COLS,
    TILE_ROWS,
    TILE_WEIGHTS,
    WINDOW,
    TileLayout,
)

Words = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int64]

_STEP, _LANE, _REGISTER, _HALF = np.indices((4, 32, 4, 2))
_ROW = _LANE // 4 + 8 * (_REGISTER % 2)
_COL = 16 * _STEP + 2 * (_LANE % 4) + 8 * (_REGISTER // 2) + _HALF


def choose_base(histogram: Ints) -> int:
    """The window's first exponent, from the number of weights of each of the 256 exponents."""
    inside = [int(histogram[base : base + WINDOW].sum()) for base in range(MAX_BASE + 1)]
    return inside.index(max(inside))


def pack(words: Words) -> dict[str, Bytes]:
    """The four parts of a BF16 matrix, bit patterns [rows, cols]."""
    layout = TileLayout(*words.shape)
    exponents = (words >> 7 & 0xFF).astype(np.int64)
    histogram = np.bincount(exponents.reshape(-1), minlength=256)
    base = choose_base(histogram)
    escaped = [e for e in range(256) if histogram[e] and not base <= e < base + WINDOW]
    narrow = len(escaped) <= NARROW_EXPONENTS

    exponent = _fragments(exponents, layout, fill=base)
    sign = _fragments((words >> 15).astype(np.int64), layout)
    mantissa = _fragments((words & 0x7F).astype(np.int64), layout)
    escapes = (exponent < base) | (exponent >= base + WINDOW)
    code = np.where(escapes, 0, exponent - base)

    tiles = np.zeros((layout.tiles, TILE_BYTES), np.uint8)
    tiles[:, :SIGN_MANTISSA_BYTES] = _pack_sign_mantissa(sign, mantissa)
    tiles[:, SIGN_MANTISSA_BYTES:] = _pack_codes(code)

    tile, position = np.nonzero(escapes.reshape(layout.tiles, TILE_WEIGHTS))
    missing = exponent.reshape(layout.tiles, TILE_WEIGHTS)[tile, position]
    if narrow:
        entries = (position | np.searchsorted(escaped, missing) << 10).astype("<u2")
    else:
        entries = (position | missing << 16).astype("<u4")
    offsets = np.searchsorted(tile, np.arange(layout.tiles + 1)).astype("<u4")
    header = np.zeros(HEADER_BYTES, np.uint8)
    if narrow:
        header[: len(escaped)] = escaped
    header[HEADER_BASE : HEADER_ENTRIES + 4].view("<u4")[:] = base, entries.itemsize, entries.size
    return {
        "tiles": tiles.reshape(-1),
        "escapes": _padded(entries, layout.escapes_bytes(entries.size, entries.itemsize)),
        "offsets": _padded(offsets, layout.offsets_bytes),
        "header": header,
    }


def decode(parts: Mapping[str, Bytes], layout: TileLayout) -> Words:
    """The bit patterns [rows, cols] of a matrix, from parts that are right."""
    tiles = parts["tiles"].reshape(layout.tiles, TILE_BYTES)
    header = parts["header"]
    base, entry_bytes, count = (int(v) for v in header[HEADER_BASE : HEADER_ENTRIES + 4].view("<u4"))
    sign, mantissa = _unpack_sign_mantissa(tiles[:, :SIGN_MANTISSA_BYTES])
    exponent = base + _unpack_codes(tiles[:, SIGN_MANTISSA_BYTES:])

    entries = parts["escapes"][: count * entry_bytes].view(f"<u{entry_bytes}").astype(np.int64)
    offsets = parts["offsets"].view("<u4")[: layout.tiles + 1].astype(np.int64)
    tile = np.repeat(np.arange(layout.tiles), np.diff(offsets))
    missing = header[entries >> 10 & 0x3F] if entry_bytes == NARROW_BYTES else entries >> 16 & 0xFF
    exponent.reshape(layout.tiles, TILE_WEIGHTS)[tile, entries & 0x3FF] = missing
    return _matrix((sign << 15 | exponent << 7 | mantissa).astype(np.uint16), layout)


def _fragments(values: Ints, layout: TileLayout, fill: int = 0) -> Ints:
    """[rows, cols] -> [tile, i, l, r, h], filled up at the edges."""
    full = np.full((layout.stripes * TILE_ROWS, layout.tiles_per_stripe * TILE_COLS), fill, np.int64)
    full[: layout.rows, : layout.cols] = values
    tiles = full.reshape(layout.stripes, TILE_ROWS, layout.tiles_per_stripe, TILE_COLS).swapaxes(1, 2)
    return tiles.reshape(-1, TILE_ROWS, TILE_COLS)[:, _ROW, _COL]


def _matrix(fragments: Words, layout: TileLayout) -> Words:
    """[tile, i, l, r, h] -> [rows, cols]."""
    tiles = np.zeros((layout.tiles, TILE_ROWS, TILE_COLS), np.uint16)
    tiles[:, _ROW, _COL] = fragments
    stripes = tiles.reshape(layout.stripes, layout.tiles_per_stripe, TILE_ROWS, TILE_COLS).swapaxes(1, 2)
    full = stripes.reshape(layout.stripes * TILE_ROWS, layout.tiles_per_stripe * TILE_COLS)
    return np.ascontiguousarray(full[: layout.rows, : layout.cols])


def _pairs(values: Ints) -> Ints:
    """[tile, i, l, r, h] -> [tile, l, pair 4i + r, h]."""
    return values.swapaxes(1, 2).reshape(len(values), 32, 16, 2)


def _unpairs(values: Ints) -> Ints:
    return np.ascontiguousarray(values.reshape(len(values), 32, 4, 4, 2).swapaxes(1, 2))


def _pack_sign_mantissa(sign: Ints, mantissa: Ints) -> Bytes:
    s, m = _pairs(sign), _pairs(mantissa)
    words = np.zeros((len(s), 32, 8), np.int64)
    for j in range(8):
        a, b = 2 * j, 2 * j + 1
        words[:, :, j] = (
            m[:, :, a, 0] | s[:, :, b, 1] << 7 | m[:, :, b, 0] << 8 | s[:, :, a, 0] << 15
            | m[:, :, a, 1] << 16 | s[:, :, b, 0] << 23 | m[:, :, b, 1] << 24 | s[:, :, a, 1] << 31
        )  # fmt: skip
    halves = words.astype("<u4").reshape(-1, 32, 2, 4).swapaxes(1, 2)  # [tile, words 0-3 or 4-7, lane, word mod 4]
    return np.ascontiguousarray(halves).reshape(len(s), -1).view(np.uint8)


def _unpack_sign_mantissa(data: Bytes) -> tuple[Ints, Ints]:
    halves = np.ascontiguousarray(data).view("<u4").reshape(-1, 2, 32, 4).astype(np.int64)
    words = halves.swapaxes(1, 2).reshape(-1, 32, 8)
    s, m = np.zeros((len(words), 32, 16, 2), np.int64), np.zeros((len(words), 32, 16, 2), np.int64)
    for j in range(8):
        word, a, b = words[:, :, j], 2 * j, 2 * j + 1
        m[:, :, a, 0], m[:, :, b, 0] = word & 0x7F, word >> 8 & 0x7F
        m[:, :, a, 1], m[:, :, b, 1] = word >> 16 & 0x7F, word >> 24 & 0x7F
        s[:, :, a, 0], s[:, :, b, 0] = word >> 15 & 1, word >> 23 & 1
        s[:, :, a, 1], s[:, :, b, 1] = word >> 31 & 1, word >> 7 & 1
    return _unpairs(s), _unpairs(m)


def _pack_codes(code: Ints) -> Bytes:
    c = _pairs(code)
    words = np.zeros((len(c), 3, 32), np.int64)
    for w in range(3):
        for j in range(5):
            words[:, w] |= c[:, :, 5 * w + j, 0] << (3 * j + 1) | c[:, :, 5 * w + j, 1] << (3 * j + 17)
        words[:, w] |= c[:, :, 15, 0] >> w & 1 | (c[:, :, 15, 1] >> w & 1) << 16
    return words.astype("<u4").reshape(len(c), -1).view(np.uint8)


def _unpack_codes(data: Bytes) -> Ints:
    words = np.ascontiguousarray(data).view("<u4").reshape(-1, 3, 32).astype(np.int64)
    c = np.zeros((len(words), 32, 16, 2), np.int64)
    for w in range(3):
        for j in range(5):
            c[:, :, 5 * w + j, 0] = words[:, w] >> (3 * j + 1) & 7
            c[:, :, 5 * w + j, 1] = words[:, w] >> (3 * j + 17) & 7
        c[:, :, 15, 0] |= (words[:, w] & 1) << w
        c[:, :, 15, 1] |= (words[:, w] >> 16 & 1) << w
    return _unpairs(c)


def _padded(values: npt.NDArray[np.uint16] | npt.NDArray[np.uint32], nbytes: int) -> Bytes:
    return np.frombuffer(values.tobytes().ljust(nbytes, b"\0"), np.uint8)
