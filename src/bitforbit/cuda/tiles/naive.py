"""The tile layout, as plainly as it can be written: the reference for the kernels.

:mod:`bitforbit.cuda.tiles.layout` says what is done here. Arrays have the axes [tile, step, lane, register, half],
so that a tile's weights in C order are in the order of positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.base import Bytes
from bitforbit.cuda.tiles.kinds import BF16, WINDOW, Elements, Kind, Words
from bitforbit.cuda.tiles.layout import (
    HEADER_BASE,
    HEADER_BYTES,
    HEADER_ENTRIES,
    NARROW_BYTES,
    NARROW_EXPONENTS,
    TILE_COLS,
    TILE_ROWS,
    TILE_WEIGHTS,
    TileLayout,
)

Ints = npt.NDArray[np.int64]

_STEP, _LANE, _REGISTER, _HALF = np.indices((4, 32, 4, 2))
_ROW = _LANE // 4 + 8 * (_REGISTER % 2)
_COL = 16 * _STEP + 2 * (_LANE % 4) + 8 * (_REGISTER // 2) + _HALF
_SIGN = 15


def choose_base(histogram: Ints, kind: Kind = BF16) -> int:
    """The window's first exponent, from the number of weights of each of the 256 exponents."""
    inside = [int(histogram[base : base + WINDOW].sum()) for base in range(kind.max_base + 1)]
    return inside.index(max(inside))


def pack(elements: Elements, kind: Kind = BF16) -> dict[str, Bytes]:
    """The four parts of a matrix, bit patterns [rows, cols]."""
    rows, cols = elements.shape
    layout = TileLayout(rows, cols, kind)
    words = kind.words(elements)
    exponents = ((words & kind.field) >> kind.shift).astype(np.int64)
    histogram = np.bincount(exponents.reshape(-1), minlength=256)
    base = choose_base(histogram, kind)
    escaped = [e for e in range(256) if histogram[e] and not base <= e < base + WINDOW]
    narrow = len(escaped) <= NARROW_EXPONENTS

    exponent = _fragments(exponents, layout, fill=base)
    rest = _fragments((words & ~np.uint16(kind.field)).astype(np.int64), layout)
    escapes = (exponent < base) | (exponent >= base + WINDOW)
    code = np.where(escapes, 0, exponent - base)
    tiles = _pack_bits(rest | code << kind.shift, kind)

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


def decode(parts: Mapping[str, Bytes], layout: TileLayout) -> Elements:
    """The bit patterns [rows, cols] of a matrix, from parts that are right."""
    kind, header = layout.kind, parts["header"]
    base, entry_bytes, count = (int(v) for v in header[HEADER_BASE : HEADER_ENTRIES + 4].view("<u4"))
    words = _unpack_bits(parts["tiles"].reshape(layout.tiles, kind.tile_bytes), kind) + (base << kind.shift)

    entries = parts["escapes"][: count * entry_bytes].view(f"<u{entry_bytes}").astype(np.int64)
    offsets = parts["offsets"].view("<u4")[: layout.tiles + 1].astype(np.int64)
    tile = np.repeat(np.arange(layout.tiles), np.diff(offsets))
    missing = header[entries >> 10 & 0x3F] if entry_bytes == NARROW_BYTES else entries >> 16 & 0xFF
    flat = words.reshape(layout.tiles, TILE_WEIGHTS)
    flat[tile, entries & 0x3FF] &= ~kind.field
    flat[tile, entries & 0x3FF] |= missing.astype(np.int64) << kind.shift
    return kind.elements(_matrix(words.astype(np.uint16), layout))


def place(kind: Kind, pair: int, half: int, bit: int) -> tuple[int, int]:
    """Word of the lane and bit there at which a bit of a weight is; that of the exponent is one of its code."""
    places = {"BF16": _place_bf16, "F16": _place_f16, "F8_E4M3": _place_f8}
    return places[kind.name](pair, half, bit)


def _place_bf16(pair: int, half: int, bit: int) -> tuple[int, int]:
    if bit < 7 or bit == _SIGN:  # the odd pairs are rotated left by 8
        return pair // 2, (16 * half + bit + 8 * (pair % 2)) % 32
    if pair == 15:
        return 8 + bit - 7, 16 * half
    return 8 + pair // 5, 16 * half + 3 * (pair % 5) + 1 + bit - 7


def _place_f16(pair: int, half: int, bit: int) -> tuple[int, int]:
    if pair < 14:
        return pair, 16 * half + bit
    at = 13 if bit == _SIGN else bit
    return 7 * (pair - 14) + at // 2, 16 * half + 13 + at % 2


def _place_f8(pair: int, half: int, bit: int) -> tuple[int, int]:
    k, byte = pair // 2, 2 * (pair % 2) + half
    if bit < 8:
        return k // 2, 8 * byte + bit - 4 * (k % 2)
    at = 7 if bit == _SIGN else bit - 8
    if k < 3:
        return 4 + k, 8 * byte + at
    if k < 6:
        return 1 + k, (8 * byte + at + 3) % 32
    return (6, 8 * byte + 12 - k) if bit == _SIGN else (k - 2, 8 * byte + 5 + at)


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


def _stored(kind: Kind) -> list[tuple[int, int, int, int, int]]:
    """(pair, half, bit, word, bit there) of all bits of a lane's weights."""
    bits = (*kind.mantissa, kind.shift, kind.shift + 1, kind.shift + 2, _SIGN)
    return [(p, h, bit, *place(kind, p, h, bit)) for p in range(16) for h in range(2) for bit in bits]


def _pack_bits(weights: Ints, kind: Kind) -> Bytes:
    """[tile, i, l, r, h] without the base -> bytes of tiles."""
    pairs = weights.swapaxes(1, 2).reshape(len(weights), 32, 16, 2)
    words = np.zeros((len(weights), 32, kind.lane_words), np.int64)
    for pair, half, bit, word, at in _stored(kind):
        words[:, :, word] |= (pairs[:, :, pair, half] >> bit & 1) << at
    runs, begin = [], 0
    for nbytes in kind.word_bytes:
        run = np.ascontiguousarray(words[:, :, begin : begin + nbytes // 4].astype("<u4"))
        runs.append(run.reshape(len(weights), -1).view(np.uint8))
        begin += nbytes // 4
    return np.concatenate(runs, 1)


def _unpack_bits(data: Bytes, kind: Kind) -> Ints:
    runs, begin = [], 0
    for nbytes in kind.word_bytes:
        run = np.ascontiguousarray(data[:, 32 * begin : 32 * (begin + nbytes)])
        runs.append(run.view("<u4").reshape(len(data), 32, nbytes // 4))
        begin += nbytes
    words = np.concatenate(runs, 2).astype(np.int64)
    pairs = np.zeros((len(data), 32, 16, 2), np.int64)
    for pair, half, bit, word, at in _stored(kind):
        pairs[:, :, pair, half] |= (words[:, :, word] >> at & 1) << bit
    return np.ascontiguousarray(pairs.reshape(len(data), 32, 4, 4, 2).swapaxes(1, 2))


def _padded(values: npt.NDArray[np.uint16] | npt.NDArray[np.uint32], nbytes: int) -> Bytes:
    return np.frombuffer(values.tobytes().ljust(nbytes, b"\0"), np.uint8)
