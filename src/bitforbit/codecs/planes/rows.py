"""Rows of a matrix from parts that lie elsewhere: only the bytes of their blocks are fetched.

The blocks that hold the rows are cut out of every part (docs/format.md, section 3.3) and put together as a matrix of
their own, with a code table for each block, which the ordinary decoder takes, with all of its checks. Where the tail
of a block begins follows from the counts of all blocks before it; these are fetched once, 12 bytes per block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitforbit.codecs.base import Bytes, Fetch
from bitforbit.codecs.planes.layout import (
    BLOCK_ROWS,
    GROUP,
    INDEX_BYTES,
    PLANE_WIDTHS,
    TABLE_BYTES,
    Layout,
)
from bitforbit.cpu import planes as kernels
from bitforbit.errors import CorruptTensorError, UsageError

_DIGIT_GROUP_BYTES = GROUP // 4


class PlanesRowReader:
    """See :class:`bitforbit.codecs.base.RowReader`."""

    step = BLOCK_ROWS

    def __init__(self, layout: Layout, dtype: str, tails_bytes: int, fetch: Fetch, end: int) -> None:
        """``tails_bytes`` is the length of the part ``tails``; rows up to ``end`` can be read."""
        if not 0 <= end <= layout.rows:
            raise UsageError(f"expected an end of rows within 0 to {layout.rows}, got {end}")
        self.cols = layout.cols
        self._layout = layout
        self._wide = layout.kind != dtype
        self._fetch = fetch
        self._blocks = -(-end // BLOCK_ROWS)
        code = kernels.empty(layout.tables * TABLE_BYTES + self._blocks * INDEX_BYTES)
        fetch("code", 0, code)
        self._tables = code[: layout.tables * TABLE_BYTES].reshape(-1, TABLE_BYTES)
        self._index = code[layout.tables * TABLE_BYTES :].reshape(-1, INDEX_BYTES)
        self._tail_begins = _tail_begins(self._index, layout.groups_in(BLOCK_ROWS) * GROUP)
        if self._tail_begins[-1] > tails_bytes:
            raise CorruptTensorError(
                f"expected the tails of {self._blocks} blocks within {tails_bytes} bytes, "
                f"got counts for {self._tail_begins[-1]}"
            )

    def read(self, begin: int, end: int, out: Bytes, threads: int) -> None:
        """See :class:`bitforbit.codecs.base.RowReader`."""
        first, last = begin // BLOCK_ROWS, -(-end // BLOCK_ROWS)
        if not 0 <= begin <= end or last > self._blocks:
            raise UsageError(f"expected rows within the first {self._blocks * BLOCK_ROWS}, got {begin} to {end}")
        if begin == end:
            return
        top = first * BLOCK_ROWS
        cut = Layout(self._layout.kind, min(last * BLOCK_ROWS, self._layout.rows) - top, self.cols, BLOCK_ROWS)
        geometry = (cut.rows, cut.cols, cut.rows_per_table)
        rows = (begin - top, end - top)
        kernels.decode(self._cut(cut, first), cut.kind, self._wide, geometry, rows, out, threads)

    def _cut(self, cut: Layout, first: int) -> dict[str, Bytes]:
        """The parts of the matrix of ``cut.blocks`` blocks from block ``first`` on."""
        blocks = slice(first, first + cut.blocks)
        tails_begin, tails_end = int(self._tail_begins[first]), int(self._tail_begins[first + cut.blocks])
        sizes = cut.part_bytes(tails_end - tails_begin)
        parts = {name: kernels.empty(size) for name, size in sizes.items()}
        table_of_block = np.arange(blocks.start, blocks.stop) * BLOCK_ROWS // self._layout.rows_per_table
        code = np.concatenate([self._tables[table_of_block].reshape(-1), self._index[blocks].reshape(-1)])
        _put(parts["code"], code)
        group = first * self._layout.groups_in(BLOCK_ROWS)
        self._get("digits", group * _DIGIT_GROUP_BYTES, cut.groups * _DIGIT_GROUP_BYTES, parts["digits"])
        whole_at = cut_at = 0
        planes = zip(PLANE_WIDTHS[cut.kind], self._layout.plane_bytes, cut.plane_bytes, strict=True)
        for width, whole_bytes, cut_bytes in planes:
            group_bytes = GROUP * width // 8
            target = parts["sign_mantissa"][cut_at : cut_at + cut_bytes]
            self._get("sign_mantissa", whole_at + group * group_bytes, cut.groups * group_bytes, target)
            whole_at += whole_bytes
            cut_at += cut_bytes
        self._get("tails", tails_begin, tails_end - tails_begin, parts["tails"])
        return parts

    def _get(self, part: str, offset: int, nbytes: int, out: Bytes) -> None:
        """Fetch that many bytes of a part; the rest of ``out`` becomes zero."""
        if nbytes:
            self._fetch(part, offset, out[:nbytes])
        out[nbytes:] = 0


def _tail_begins(index: Bytes, positions: int) -> npt.NDArray[np.int64]:
    """Where the tail of each block of the index begins, and where the last one ends: ``[blocks + 1]``.

    Raises CorruptTensorError for counts of more than ``positions``, so that sums cannot overflow.
    """
    counts = np.frombuffer(index.tobytes(), "<u4").reshape(-1, 3).astype(np.int64)
    if counts.max(initial=0) > positions:
        raise CorruptTensorError(f"expected counts up to {positions} in every block, got {counts.max()}")
    digit_groups = -(-counts[:, :2] // GROUP)
    begins = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(digit_groups.sum(1) * _DIGIT_GROUP_BYTES + counts[:, 2], out=begins[1:])
    return begins


def _put(out: Bytes, data: Bytes) -> None:
    out[: data.size] = data
    out[data.size :] = 0
