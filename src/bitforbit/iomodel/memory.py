"""A machine with two levels of memory that counts every word it moves: the model of arXiv 2402.07443, section 2.

Slow memory is unlimited and holds named matrices. Fast memory holds blocks, of at most ``words`` words together;
arithmetic sees blocks only. A word is one element. Arithmetic on a block goes element by element: its intermediate
values live in registers and take no fast memory; whatever outlives one element must be a block.

With data, matrices are float64 arrays, and a block that was freed or never filled cannot be used unnoticed (it is gone,
or NaN). Without data the same algorithm only counts: :meth:`TwoLevelMemory.spans` then visits one full tile for all of
them, so that the time taken does not depend on the size of the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitforbit.errors import IoModelError

Array = npt.NDArray[np.float64]


class Block:
    """A rows x cols piece of fast memory."""

    __slots__ = ("array", "cols", "live", "rows")

    def __init__(self, rows: int, cols: int, array: Array | None) -> None:
        self.rows, self.cols, self.array, self.live = rows, cols, array, True

    @property
    def words(self) -> int:
        """Its size."""
        return self.rows * self.cols


class TwoLevelMemory:
    """Slow memory of the given matrices and a fast memory of ``words`` words, empty at first.

    ``loads`` and ``stores`` are words moved so far, ``peak`` the most words in fast memory at a time.
    """

    def __init__(self, words: int, matrices: Mapping[str, Array] | None = None) -> None:
        if words < 1:
            raise IoModelError(f"expected a fast memory of at least one word, got {words}")
        self.words = words
        self.with_data = matrices is not None
        self.slow: dict[str, Array] = {} if matrices is None else {k: np.array(v, float) for k, v in matrices.items()}
        self.loads = self.stores = self.used = self.peak = 0
        self._times = 1  # how often the loop body being walked runs

    @property
    def moved(self) -> int:
        """Words moved between the memories."""
        return self.loads + self.stores

    def declare(self, name: str, rows: int, cols: int) -> None:
        """A new matrix in slow memory, of undefined content."""
        if self.with_data:
            self.slow[name] = np.full((rows, cols), np.nan)

    def load(self, name: str, rows: slice, cols: slice) -> Block:
        """Copy part of a matrix to fast memory. Raises IoModelError if it does not fit."""
        block = self._new(_length(rows), _length(cols))
        if self.with_data:
            block.array = self.slow[name][rows, cols].copy()
        self.loads += self._times * block.words
        return block

    def allocate(self, rows: int, cols: int, value: float = np.nan) -> Block:
        """A block of fast memory that moves nothing. Raises IoModelError if it does not fit."""
        block = self._new(rows, cols)
        if self.with_data:
            block.array = np.full((rows, cols), value, float)
        return block

    def store(self, block: Block, name: str, rows: slice, cols: slice) -> None:
        """Copy a block to its place in slow memory; it stays in fast memory."""
        _check_live(block)
        if (block.rows, block.cols) != (_length(rows), _length(cols)):
            raise IoModelError(
                f"expected a block of {_length(rows)} x {_length(cols)}, got {block.rows} x {block.cols}"
            )
        if self.with_data:
            self.slow[name][rows, cols] = block.array
        self.stores += self._times * block.words

    def free(self, *blocks: Block) -> None:
        """Give the room of these blocks back."""
        for block in blocks:
            _check_live(block)
            block.live, block.array = False, None
            self.used -= block.words

    def compute(self, function: Callable[..., Any], *blocks: Block, **constants: float) -> None:
        """Call ``function`` with the arrays of these blocks, to be changed in place; counting only: do nothing."""
        for block in blocks:
            _check_live(block)
        if self.with_data:
            function(*(block.array for block in blocks), **constants)

    def spans(self, total: int, size: int) -> Iterator[slice]:
        """Cut [0, total) into spans of ``size``, the last one shorter.

        Counting only: the body runs once for all full spans and once for the rest, and what it moves counts as often
        as it would. Exact, because nothing else in a body depends on where its span lies.
        """
        if self.with_data:
            for begin in range(0, total, size):
                yield slice(begin, min(begin + size, total))
            return
        full, rest = divmod(total, size)
        outer = self._times
        for span, times in ((slice(0, size), full), (slice(total - rest, total), int(rest > 0))):
            if times:
                self._times = outer * times
                yield span
                self._times = outer

    def _new(self, rows: int, cols: int) -> Block:
        if self.used + rows * cols > self.words:
            raise IoModelError(
                f"expected at most {self.words} words in fast memory, got {self.used} and {rows} x {cols} more"
            )
        self.used += rows * cols
        self.peak = max(self.peak, self.used)
        return Block(rows, cols, None)


def _length(span: slice) -> int:
    return int(span.stop - span.start)


def _check_live(block: Block) -> None:
    if not block.live:
        raise IoModelError(f"expected a block in fast memory, got one of {block.rows} x {block.cols} that was freed")
