"""DF11's code and decode tables: building them, and checking those of a file.

The code is a Huffman code over the exponents present and an end mark (EOF) of count 1, not canonical. Ties are broken
by the smallest-first rule below, so that equal counts give equal files everywhere.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.df11.unit import MAX_CODE_BITS, MAX_EXPONENT, MAX_TABLES
from bitforbit.errors import Df11LutError, Df11UnrepresentableError

EOF = -1
"""The end mark: smaller than every exponent, which is how ties are broken."""


class Code(NamedTuple):
    """A code word: the low ``length`` bits of ``bits``."""

    bits: int
    length: int


@dataclass(frozen=True)
class Codebook:
    """Code of a unit. codes, lengths ``[256]`` by exponent (length 0: absent); luts ``[tables + 1, 256]``."""

    codes: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint8]
    eof: Code
    luts: npt.NDArray[np.uint8]


def build(counts: npt.NDArray[np.int64]) -> Codebook:
    """Codebook for exponent counts ``[256]``.

    Raises Df11UnrepresentableError for exponents above 239 and for counts that are all zero.

    Two cases that the reference compressor cannot write get a right file here. One exponent only: its code has two
    bits (one bit would put 64 weights in a window, more than the reference kernel's shared memory holds). More than
    17 tables: counts are raised to a floor of 2, 4, 8, ... until the code is flat enough.
    """
    present = np.flatnonzero(counts)
    if present.size == 0 or present[-1] > MAX_EXPONENT:
        top = f"exponent {present[-1]}" if present.size else "no weight at all"
        raise Df11UnrepresentableError(f"DF11 holds exponents 0 to {MAX_EXPONENT} of at least one weight, got {top}")
    if present.size == 1:
        return _codebook({int(present[0]): Code(0b00, 2), EOF: Code(0b01, 2)})
    table = _limited(counts, present)
    floor = 2
    while len(_prefixes(table)) > MAX_TABLES:
        table = _limited(np.where(counts > 0, np.maximum(counts, floor), 0), present)
        floor *= 2
    return _codebook(table)


def _limited(counts: npt.NDArray[np.int64], present: npt.NDArray[np.intp]) -> dict[int, Code]:
    """Code table of at most 32 bits: the k rarest exponents count as 1, for the smallest k >= 2 that does it."""
    frequencies = counts[present].astype(np.int64)
    table = _huffman(present, frequencies)
    k = 2
    while max(code.length for code in table.values()) > MAX_CODE_BITS:
        flattened = frequencies.copy()
        flattened[np.argpartition(frequencies, k)[:k]] = 1
        table = _huffman(present, flattened)
        k += 1
    return table


def _huffman(symbols: npt.NDArray[np.intp], counts: npt.NDArray[np.int64]) -> dict[int, Code]:
    """Merge the two smallest nodes until one is left; nodes compare by count, then by their first symbol.

    The smaller node takes bit 0. The order of the result is that of the leaves.
    """
    heap = [(1, EOF, [(EOF, Code(0, 0))])]
    heap += [(int(c), int(s), [(int(s), Code(0, 0))]) for s, c in zip(symbols, counts, strict=True)]
    heapq.heapify(heap)
    while len(heap) > 1:
        low_count, representative, low = heapq.heappop(heap)
        high_count, _, high = heapq.heappop(heap)
        leaves = [(s, Code(c.bits, c.length + 1)) for s, c in low]
        leaves += [(s, Code(c.bits | 1 << c.length, c.length + 1)) for s, c in high]
        heapq.heappush(heap, (low_count + high_count, representative, leaves))
    return dict(heap[0][2])


def _prefix(code: Code) -> tuple[int, int]:
    """(levels, bits) of the whole bytes that come before a code's last, perhaps partial, byte."""
    levels = (code.length - 1) // 8
    return levels, code.bits >> (code.length - 8 * levels)


def _prefixes(table: dict[int, Code]) -> list[tuple[int, int]]:
    """One decode table for each: the root, then by level, in order of first appearance within a level."""
    found = dict.fromkeys([(0, 0), *(_prefix(code) for symbol, code in table.items() if symbol != EOF)])
    return sorted(found, key=lambda prefix: prefix[0])


def _codebook(table: dict[int, Code]) -> Codebook:
    prefixes = _prefixes(table)
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    entries: list[dict[int, int]] = [{} for _ in prefixes]
    for symbol, code in table.items():
        if symbol == EOF:
            continue
        levels, prefix = _prefix(code)
        rest = code.length - 8 * levels
        entries[index[levels, prefix]][(code.bits & ((1 << rest) - 1)) << (8 - rest)] = symbol
        for level in range(levels):
            parent = code.bits >> (code.length - 8 * level)
            child = code.bits >> (code.length - 8 * level - 8)
            entries[index[level, parent]][child & 0xFF] = 256 - index[level + 1, child]
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    # Entries without a code repeat the one before, at the start of a table the last one of the table before. At the
    # start of the root nothing is before: the first one then.
    fill = entries[0][min(entries[0])]
    for row, known in zip(luts, entries, strict=False):
        for byte in range(256):
            fill = known.get(byte, fill)
            row[byte] = fill
    codes = np.zeros(256, np.uint32)
    for symbol, code in table.items():
        if symbol != EOF:
            codes[symbol] = code.bits
            luts[-1, symbol] = code.length
    return Codebook(codes, luts[-1].copy(), table[EOF], luts)


def validate_luts(luts: npt.NDArray[np.uint8]) -> None:
    """Check the decode tables of a file: after this, every walk ends after at most four levels.

    Raises Df11LutError for a shape other than ``[2..18, 256]``, code lengths above 32 or for pointer values, pointers
    that dangle or loop, tables that nothing leads to, and lengths that contradict the tables.

    A code that no exponent has (EOF's) leaves entries unused. Those at the start of a table after the root may hold
    anything, as the reference compressor leaves the end of the previous table there; everywhere else they repeat the
    entry before them.
    """
    if luts.ndim != 2 or luts.shape[1] != 256 or not 2 <= luts.shape[0] <= MAX_TABLES + 1 or luts.dtype != np.uint8:
        raise Df11LutError(f"expected luts of uint8 [2 to {MAX_TABLES + 1}, 256], got {luts.dtype} {list(luts.shape)}")
    tables, lengths = luts[:-1], luts[-1].astype(np.int64)
    if lengths.max() > MAX_CODE_BITS:
        raise Df11LutError(f"expected code lengths of at most {MAX_CODE_BITS} bits, got {lengths.max()}")
    if lengths[MAX_EXPONENT + 1 :].any():
        raise Df11LutError(f"expected no code for exponents above {MAX_EXPONENT}, which are pointers")
    levels = {0: 0}
    coded: set[int] = set()
    for index in range(len(tables)):
        if index not in levels:
            raise Df11LutError(f"table {index} is reached from no table before it")
        _check_table(tables, index, levels, lengths, coded)
    missing = set(np.flatnonzero(lengths).tolist()) - coded
    if missing:
        symbol = min(missing)
        raise Df11LutError(f"exponent {symbol} has a code of {lengths[symbol]} bits that is in no table")


def _check_table(
    tables: npt.NDArray[np.uint8],
    index: int,
    levels: dict[int, int],
    lengths: npt.NDArray[np.int64],
    coded: set[int],
) -> None:
    """Check table ``index``; note the tables it leads to in ``levels`` and its exponents in ``coded``."""
    row, level = tables[index], levels[index]
    starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), 256]
    for begin, end in itertools.pairwise(starts):
        value = int(row[begin])
        fault = _fault(value, begin, end, index, len(tables), level, levels, lengths)
        if fault is None:
            if value > MAX_EXPONENT:
                levels[256 - value] = level + 1
            else:
                coded.add(value)
        elif begin > 0 or index == 0 or end & (end - 1) or end == 256:
            raise Df11LutError(f"table {index}, entries {begin} to {end - 1}: {fault}")


def _fault(
    value: int,
    begin: int,
    end: int,
    index: int,
    num_tables: int,
    level: int,
    levels: dict[int, int],
    lengths: npt.NDArray[np.int64],
) -> str | None:
    """What is wrong with a run of equal entries, if anything."""
    if value > MAX_EXPONENT:
        target = 256 - value
        if target >= num_tables:
            return f"pointer to table {target}, expected one below {num_tables}"
        if target <= index:
            return f"pointer back to table {target}: a loop"
        if levels.get(target, level + 1) != level + 1 or level == 3:
            return f"pointer to table {target}, which has another depth"
        return None
    length = int(lengths[value])
    if not 8 * level < length <= 8 * level + 8:
        return f"exponent {value} at depth {level} has a code length of {length}"
    width = 1 << (8 * level + 8 - length)
    if begin % width or end - begin < width:
        return f"exponent {value} of code length {length} fills {end - begin} entries, expected {width}, aligned"
    return None
