"""Geometry of the tile layout, in which matrices lie in GPU memory. Private: packed at load, never on disk.

Weights are BF16, FP16 or FP8 (E4M3), :mod:`bitforbit.cuda.tiles.kinds`, and have 16 bits in registers.

A matrix ``[rows, cols]`` is cut into tiles of 16 rows x 64 columns; edge tiles are filled up. Tile (s, k), stripe s of
16 rows and columns 64k to 64k + 63, has number s * tiles_per_stripe + k. Weights lie in the register order of the
matrix instructions (PTX ISA, mma.m16n8k16: fragment A, which is also wgmma's A in registers, a warp per 16 rows): step
i (0-3, 16 columns each), lane l (0-31), register r (0-3), half h (0: low 16 bits) hold

    row    = l div 4 + 8 * (r mod 2)
    column = 16 * i + 2 * (l mod 4) + 8 * (r div 2) + h
    position = 256 * i + 8 * l + 2 * r + h          (0-1023)
    pair p   = 4 * i + r of lane l                  (0-15)

Four parts, bytes each:

``tiles``: 11 bits per weight for BF16, 1408 bytes per tile; 14 for FP16, 1792; 7 for FP8, 896. The exponent of a weight
    is base + code, a code having 3 bits, unless it is an escape, whose code is 0. Positions outside the matrix have
    sign, mantissa and code 0. Low and high are the two halves of a pair.
  BF16
    [0:1024) sign and mantissa: lane l has 32-bit words 0-3 at 16 * l and words 4-7 at 512 + 16 * l. Word j holds pairs
    2j ("A") and 2j + 1 ("B"); mantissa has 7 bits:
        [6:0] A low mantissa, [7] B high sign, [14:8] B low mantissa, [15] A low sign,
        [22:16] A high mantissa, [23] B low sign, [30:24] B high mantissa, [31] A high sign,
    so that ``word & 0x807F807F`` is pair A and ``rotate_right(word, 8) & 0x807F807F`` pair B, but for the exponents.
    [1024:1408) codes: lane l has word w (0-2) at 1024 + 128 * w + 4 * l. Word w holds pairs 5w + j, j = 0-4: low half's
    code at [3j+3 : 3j+1], high half's at [3j+19 : 3j+17]. Pair 15 has bit b of its low code at bit 0, of its high code
    at bit 16 of word b.
  FP16
    Lane l has words 0-11 by four at 16 * l, 512 + 16 * l, 1024 + 16 * l; words 12 and 13 at 1536 + 8 * l. Word p has
    pair p, p = 0-13, in place, low half at [15:0], high half at [31:16]: sign [15], code [12:10], mantissa [9:0]. The
    two free bits [14:13] of a half hold pair 14 (words 0-6) or 15 (words 7-13), two bits in each word: [1:0], [3:2],
    ..., [11:10], and in the seventh word [12] at [13] and the sign at [14].
  FP8
    Lane l has words 0-3 at 16 * l, words 4, 5, 6 at 512 + 4 * l, 640 + 4 * l, 768 + 4 * l. A weight is a low part of
    four bits, code [0] and mantissa [2:0], and a high one, sign and code [2:1]. Pairs 2k and 2k + 1 are bytes 0-3, in
    the order of halves. Low parts: words 0-3; of k = 2i the high nibbles of the bytes of word i, of k = 2i + 1 the low
    ones. High parts: of k = 0-2 byte b of word 4 + k, sign at [7], code at [1:0]; of k = 3-5 the same in word 1 + k
    rotated left by 3; of k = 6 and 7 code at [6:5] of the bytes of word 4 and 5, sign at [6] and at [5] of those of
    word 6.
``escapes``: weights whose exponent is not within base to base + 7, tile by tile, in the order of positions.
    Narrow entries, u16: [9:0] position, [15:10] index into the header's exponents. Wide ones, u32: [9:0] position,
    [23:16] exponent. Padded with zeros to a multiple of 16 bytes, and at least 16.
``offsets``: u32 [tiles + 1], number of entries before each tile; padded with zeros to a multiple of 16 bytes.
``header``: 128 bytes: [0:64) exponents of escapes, ascending, filled up with zeros (all zeros if entries are wide); u32
    base at 64; u32 bytes of an entry at 68 (2, or 4 if more than 64 exponents escape); u32 number of entries
    at 72; zeros.

Exponents are 0-255 of BF16, 0-31 of FP16; 0-15 of FP8, and 255 for its NaN. The base is the lowest of those with the
fewest escapes for which all of the window is among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitforbit.cuda.tiles.kinds import BF16, Kind
from bitforbit.errors import UsageError

PARTS = ("tiles", "escapes", "offsets", "header")

TILE_ROWS = 16
TILE_COLS = 64
TILE_WEIGHTS = TILE_ROWS * TILE_COLS
HEADER_BYTES = 128
HEADER_BASE = 64
HEADER_ENTRY_BYTES = 68
HEADER_ENTRIES = 72
NARROW_EXPONENTS = 64
NARROW_BYTES = 2
WIDE_BYTES = 4
ALIGNMENT = 16
SIZE_LIMIT = 1 << 31


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of parts."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class TileLayout:
    """Sizes that follow from a matrix's rows and columns (both at least 1)."""

    rows: int
    cols: int
    kind: Kind = BF16

    @property
    def stripes(self) -> int:
        """Stripes of 16 rows."""
        return -(-self.rows // TILE_ROWS)

    @property
    def tiles_per_stripe(self) -> int:
        """Tiles side by side."""
        return -(-self.cols // TILE_COLS)

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.stripes * self.tiles_per_stripe

    @property
    def tiles_bytes(self) -> int:
        """Length of the part ``tiles``."""
        return self.tiles * self.kind.tile_bytes

    @property
    def matrix_bytes(self) -> int:
        """Length of the plain matrix."""
        return self.rows * self.cols * self.kind.item_bytes

    @property
    def offsets_bytes(self) -> int:
        """Length of the part ``offsets``."""
        return padded(4 * (self.tiles + 1))

    def check_size(self) -> None:
        """Raise UsageError for a matrix that the kernels' 32-bit indices cannot address."""
        if max(self.rows, self.cols, self.tiles) >= SIZE_LIMIT:
            raise UsageError(
                f"expected a matrix of fewer than 2^31 rows, columns and tiles, got [{self.rows}, {self.cols}]; "
                "keep it in another layout"
            )

    @staticmethod
    def escapes_bytes(entries: int, entry_bytes: int) -> int:
        """Length of the part ``escapes``."""
        return max(ALIGNMENT, padded(entries * entry_bytes))

    def nbytes(self, entries: int, entry_bytes: int) -> int:
        """Length of all parts together."""
        return self.tiles_bytes + self.escapes_bytes(entries, entry_bytes) + self.offsets_bytes + HEADER_BYTES
