"""The ``planes`` codec, as plainly as it can be written: the reference for every fast version.

Outline (docs/format.md, section 3): the exponents of a matrix are ranked by frequency per code table. A rank is
written as up to three base-4 digits: 0, 1, 2 name one of three ranks, 3 says "look at the next level". Level 1 has a
digit for every weight, level 2 one for every 3 of level 1, level 3 one for every 3 of level 2; a 3 there is followed
by the exponent itself, as a byte. Sign and mantissa are stored as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitforbit import dtypes
from bitforbit.codecs.base import Bytes
from bitforbit.codecs.planes.layout import (
    BLOCK_ROWS,
    CODED_RANKS,
    GROUP,
    INDEX_BYTES,
    PLANE_WIDTHS,
    RANKS_PER_LEVEL,
    TABLE_BYTES,
    Layout,
    natural_index,
    pad,
)
from bitforbit.errors import CorruptTensorError

Words = npt.NDArray[np.uint32]


def group_elements(layout: Layout, block: int) -> Iterator[list[int | None]]:
    """For each group of a block: the flat element index at each of its 64 positions, None where there is none."""
    rows, cols, first = layout.block_rows(block), layout.cols, block * BLOCK_ROWS
    runs: list[list[int]] = []
    tiles = cols // GROUP
    for tile in range(tiles):
        for row in range(first, first + rows):
            runs.append([row * cols + tile * GROUP + j for j in range(GROUP)])
    edge = [row * cols + col for row in range(first, first + rows) for col in range(tiles * GROUP, cols)]
    runs += [edge[i : i + GROUP] for i in range(0, len(edge), GROUP)]
    itemsize = dtypes.FLOAT_LAYOUTS[layout.kind].itemsize
    for run in runs:
        indices = [natural_index(p, itemsize) for p in range(GROUP)]
        yield [run[j] if j < len(run) else None for j in indices]


def pack(values: list[int], width: int) -> bytes:
    """Pack 64 numbers of ``width`` bits: position p goes to byte p mod 8w, at bit w * (p div 8w)."""
    stride = 8 * width
    packed = bytearray(stride)
    for p, value in enumerate(values):
        packed[p % stride] |= value << (width * (p // stride))
    return bytes(packed)


def unpack(packed: bytes, width: int) -> list[int]:
    """Inverse of :func:`pack`."""
    stride = 8 * width
    return [packed[p % stride] >> (width * (p // stride)) & ((1 << width) - 1) for p in range(GROUP)]


def pack_digits(digits: list[int]) -> bytes:
    """Digits of a tail level, in groups of 64, the last one filled up with zeros."""
    padded = digits + [0] * (-len(digits) % GROUP)
    return b"".join(pack(padded[i : i + GROUP], 2) for i in range(0, len(padded), GROUP))


def encode(words: Words, layout: Layout, tables: list[list[int]]) -> dict[str, Bytes]:
    """Encode bit patterns (flat, row-major) with the given code tables (exponents by rank, at most 9 each)."""
    exponents, rests = dtypes.split(words, dtypes.FLOAT_LAYOUTS[layout.kind])
    widths = PLANE_WIDTHS[layout.kind]
    planes = [bytearray() for _ in widths]
    digits, tails, index = bytearray(), bytearray(), bytearray()
    for block in range(layout.blocks):
        table = tables[block * BLOCK_ROWS // layout.rows_per_table]
        level2: list[int] = []
        level3: list[int] = []
        raw: list[int] = []
        for group in group_elements(layout, block):
            level1 = []
            for element in group:
                exponent = None if element is None else int(exponents[element])
                rank = 0 if exponent is None else table.index(exponent) if exponent in table else CODED_RANKS
                level1.append(min(rank, RANKS_PER_LEVEL))
                if rank >= 3:
                    level2.append(min(rank - 3, RANKS_PER_LEVEL))
                if rank >= 6:
                    level3.append(min(rank - 6, RANKS_PER_LEVEL))
                if rank >= 9:
                    assert exponent is not None
                    raw.append(exponent)
            digits += pack(level1, 2)
            shift = 0
            for plane, width in zip(planes, widths, strict=True):
                rest = [0 if e is None else int(rests[e]) >> shift & ((1 << width) - 1) for e in group]
                plane += pack(rest, width)
                shift += width
        tails += pack_digits(level2) + pack_digits(level3) + bytes(raw)
        index += np.array([len(level2), len(level3), len(raw)], "<u4").tobytes()
    code = b"".join(bytes(t).ljust(TABLE_BYTES, b"\0") for t in tables) + index
    return {
        "code": padded(code),
        "digits": padded(digits),
        "sign_mantissa": np.concatenate([padded(plane) for plane in planes]),
        "tails": padded(tails),
    }


def decode(parts: dict[str, Bytes], layout: Layout) -> Words:
    """Decode to bit patterns (flat, row-major). Raises CorruptTensorError if the tails contradict the digits."""
    widths = PLANE_WIDTHS[layout.kind]
    code, digits, tails = (parts[name].tobytes() for name in ("code", "digits", "tails"))
    planes, begin = [], 0
    for size in layout.plane_bytes:
        planes.append(parts["sign_mantissa"][begin : begin + size].tobytes())
        begin += size
    exponents = np.zeros(layout.rows * layout.cols, np.uint32)
    rests = np.zeros(layout.rows * layout.cols, np.uint32)
    k, at = 0, 0
    for block in range(layout.blocks):
        table_at = (block * BLOCK_ROWS // layout.rows_per_table) * TABLE_BYTES
        table = code[table_at : table_at + CODED_RANKS]
        index_at = layout.tables * TABLE_BYTES + block * INDEX_BYTES
        counts = np.frombuffer(code, "<u4", 3, index_at).tolist()
        levels: list[Iterator[int]] = []
        for count in counts[:2]:
            groups = [
                unpack(tails[i : i + 16].ljust(16, b"\0"), 2) for i in range(at, at + -(-count // GROUP) * 16, 16)
            ]
            levels.append(iter([digit for group in groups for digit in group][:count]))
            at += -(-count // GROUP) * 16
        levels.append(iter(tails[at : at + counts[2]]))
        at += counts[2]
        try:
            for group in group_elements(layout, block):
                level1 = unpack(digits[16 * k : 16 * k + 16], 2)
                fields = [unpack(p[8 * w * k : 8 * w * (k + 1)], w) for p, w in zip(planes, widths, strict=True)]
                for p, element in enumerate(group):
                    digit, base = level1[p], 0
                    while digit == RANKS_PER_LEVEL and base < 6:
                        digit, base = next(levels[base // 3]), base + 3
                    exponent = next(levels[2]) if digit == RANKS_PER_LEVEL else table[base + digit]
                    if element is not None:
                        exponents[element] = exponent
                        shift = 0
                        for field, width in zip(fields, widths, strict=True):
                            rests[element] |= field[p] << shift
                            shift += width
                k += 1
        except StopIteration:
            raise CorruptTensorError(f"expected {counts} tail entries in block {block} to suffice") from None
        if any(next(level, None) is not None for level in levels):
            raise CorruptTensorError(f"expected all of {counts} tail entries in block {block} to be used")
    return dtypes.join(exponents, rests, dtypes.FLOAT_LAYOUTS[layout.kind])


def padded(data: bytes | bytearray) -> Bytes:
    """Bytes, zero-padded to the alignment of parts."""
    return np.frombuffer(bytes(data).ljust(pad(len(data)), b"\0"), np.uint8)
