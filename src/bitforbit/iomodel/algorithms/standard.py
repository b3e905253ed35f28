"""Attention that materialises S and P in slow memory: two tiled products and a softmax between them."""

from __future__ import annotations

from math import inf, sqrt

from bitforbit.iomodel.algorithms import steps
from bitforbit.iomodel.memory import Block, TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles


def run(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    """Tiles: rows x cols of S, out_rows x out_cols of O. Slow memory gets S (later P) and O."""
    memory.declare("S", n, n)
    memory.declare("O", n, d)
    _scores(memory, n, d, tiles)
    _softmax(memory, n)
    for rows in memory.spans(n, tiles.out_rows):
        for cols in memory.spans(d, tiles.out_cols):
            out = memory.allocate(rows.stop - rows.start, cols.stop - cols.start, 0)
            for key in memory.spans(n, 1):
                p, v = memory.load("S", rows, key), memory.load("V", key, cols)
                memory.compute(steps.add_product, out, p, v)
                memory.free(p, v)
            memory.store(out, "O", rows, cols)
            memory.free(out)


def _scores(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    for rows in memory.spans(n, tiles.rows):
        for keys in memory.spans(n, tiles.cols):
            s = score_tile(memory, rows, keys, d)
            memory.store(s, "S", rows, keys)
            memory.free(s)


def score_tile(memory: TwoLevelMemory, rows: slice, keys: slice, d: int) -> Block:
    """A tile of Q K^T / sqrt(d) in fast memory: it stays, columns of Q and K stream."""
    s = memory.allocate(rows.stop - rows.start, keys.stop - keys.start, 0)
    for channel in memory.spans(d, 1):
        q, k = memory.load("Q", rows, channel), memory.load("K", keys, channel)
        memory.compute(steps.add_scores, s, q, k)
        memory.free(q, k)
    memory.compute(steps.multiply, s, factor=1 / sqrt(d))
    return s


def _softmax(memory: TwoLevelMemory, n: int) -> None:
    """Row by row: once through fast memory if a row fits, else once for its statistics and once for the weights."""
    piece = softmax_piece(n, memory.words)
    for row in memory.spans(n, 1):
        maxima, sums = memory.allocate(1, 1, -inf), memory.allocate(1, 1, 0)
        if piece < n:
            for keys in memory.spans(n, piece):
                s = memory.load("S", row, keys)
                memory.compute(steps.softmax_statistics, s, maxima, sums)
                memory.free(s)
        for keys in memory.spans(n, piece):
            s = memory.load("S", row, keys)
            if piece == n:
                memory.compute(steps.softmax_statistics, s, maxima, sums)
            memory.compute(steps.softmax_weights, s, maxima, sums)
            memory.store(s, "S", row, keys)
            memory.free(s)
        memory.free(maxima, sums)


def softmax_piece(n: int, words: int) -> int:
    """Scores of a row that are in fast memory at a time, beside its two statistics."""
    return max(1, min(n, words - 2))
