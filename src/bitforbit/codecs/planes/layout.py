"""Geometry of the ``planes`` codec: matrix view, blocks, groups and plane sizes (docs/format.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bitforbit.codecs.base import PART_ALIGNMENT
from bitforbit.errors import CorruptTensorError

BLOCK_ROWS = 16
GROUP = 64
TABLE_BYTES = 16
INDEX_BYTES = 12
"""Three u32 per block: how many level-2 digits, level-3 digits and raw exponents its tail holds."""

RANKS_PER_LEVEL = 3
CODED_RANKS = 9

# Widths in bits of the planes that hold sign and mantissa, lowest bits first.
PLANE_WIDTHS: dict[str, tuple[int, ...]] = {
    "BF16": (8,),
    "F16": (8, 2, 1),
    "F32": (8, 8, 8),
    "F8_E4M3": (4,),
    "F8_E5M2": (2, 1),
}

# An upper bound for rows and columns, so that no size below overflows 64 bits.
MAX_ELEMENTS = 1 << 48


def pad(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of parts."""
    return -(-nbytes // PART_ALIGNMENT) * PART_ALIGNMENT


def matrix_view(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns under which a writer codes a tensor of this shape.

    The last dimension gives the columns; dimensions before it are merged into the columns while those are fewer than
    a group (convolution kernels). A long vector is folded into rows where it divides, so that threads can share it.
    """
    elements = math.prod(shape)
    if len(shape) >= 2:
        cols, lead = shape[-1], list(shape[:-1])
        while cols < GROUP and len(lead) > 1:
            cols *= lead.pop()
        return elements // cols, cols
    if elements > 1 << 16:
        for cols in range(4096, GROUP - 1, -GROUP):
            if elements % cols == 0:
                return elements // cols, cols
    return 1, elements


def natural_index(position: int, itemsize: int) -> int:
    """Index (0-63) within its group of the element at a position of the planes.

    One-byte floats keep their order. Wider ones are stored so that two byte-unpack instructions per vector restore
    the natural order, whatever the vector's width.
    """
    if itemsize == 1:
        return position
    lane, byte = divmod(position, 16)
    return 8 * lane + byte if byte < 8 else 32 + 8 * lane + (byte - 8)


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a tensor's coded float, rows, columns and rows per code table."""

    kind: str
    rows: int
    cols: int
    rows_per_table: int

    @classmethod
    def from_config(cls, config: Mapping[str, int | str], dtype: str, shape: tuple[int, ...]) -> Layout:
        """Layout of an encoded tensor, every member of the (untrusted) config checked. Raises CorruptTensorError."""
        kind, rows, cols, per_table = (config.get(k) for k in ("kind", "rows", "cols", "rows_per_table"))
        if not isinstance(kind, str) or kind not in PLANE_WIDTHS:
            raise CorruptTensorError(f"expected a planes kind among {', '.join(PLANE_WIDTHS)}, got {kind!r}")
        if dtype != kind and (dtype, kind) != ("F32", "BF16"):
            raise CorruptTensorError(f"expected dtype {dtype} to be coded as itself, got kind {kind}")
        sizes = (rows, cols, per_table)
        if not all(type(n) is int and 1 <= n <= MAX_ELEMENTS for n in sizes):
            raise CorruptTensorError(f"expected positive integers for rows, cols and rows_per_table, got {sizes}")
        assert isinstance(rows, int)
        assert isinstance(cols, int)
        assert isinstance(per_table, int)
        if rows * cols != math.prod(shape) or rows * cols > MAX_ELEMENTS:
            raise CorruptTensorError(f"expected rows * cols to match shape {shape}, got {rows} * {cols}")
        if per_table % BLOCK_ROWS:
            raise CorruptTensorError(f"expected rows_per_table to be a multiple of {BLOCK_ROWS}, got {per_table}")
        return cls(kind, rows, cols, per_table)

    @property
    def blocks(self) -> int:
        """Number of 16-row blocks, the last of which may be short."""
        return -(-self.rows // BLOCK_ROWS)

    @property
    def tables(self) -> int:
        """Number of code tables."""
        return -(-self.rows // self.rows_per_table)

    def block_rows(self, block: int) -> int:
        """Rows of one block."""
        return min(BLOCK_ROWS, self.rows - block * BLOCK_ROWS)

    def groups_in(self, rows: int) -> int:
        """Groups of 64 positions in a block of that many rows: whole tile rows, then the edge columns run together."""
        return rows * (self.cols // GROUP) + -(-rows * (self.cols % GROUP) // GROUP)

    @property
    def groups(self) -> int:
        """Groups of the whole tensor."""
        return (self.blocks - 1) * self.groups_in(BLOCK_ROWS) + self.groups_in(self.block_rows(self.blocks - 1))

    @property
    def code_bytes(self) -> int:
        """Length of the part ``code``."""
        return pad(self.tables * TABLE_BYTES + self.blocks * INDEX_BYTES)

    @property
    def digits_bytes(self) -> int:
        """Length of the part ``digits``."""
        return pad(self.groups * GROUP // 4)

    def part_bytes(self, tails: int) -> dict[str, int]:
        """Length of every part; that of the tails, which depends on the data, is rounded up to the alignment."""
        return {
            "code": self.code_bytes,
            "digits": self.digits_bytes,
            "sign_mantissa": sum(self.plane_bytes),
            "tails": pad(tails),
        }

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Length of each plane of the part ``sign_mantissa``."""
        return tuple(pad(self.groups * GROUP * width // 8) for width in PLANE_WIDTHS[self.kind])
