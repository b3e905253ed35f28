"""Square tiling for small caches, M < d^2 (arXiv 2402.07443, Algorithm 1): as published, and improved."""

from __future__ import annotations

from math import inf, sqrt

from bitforbit.iomodel.algorithms import steps
from bitforbit.iomodel.algorithms.standard import score_tile
from bitforbit.iomodel.memory import TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles

_ONE = slice(0, 1)


def run_published(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    """Phase 1 writes B x B tiles of exp(Q K^T) and row sums, phase 2 makes B x B tiles of O; tiles move whole.

    Tiles: rows = cols = out_rows = B, out_cols = B for channels.
    exp is unshifted as published: scores above about 700 overflow. (The 1/sqrt(d) is ours.)
    """
    b, depth = tiles.rows, tiles.out_cols
    memory.declare("P", n, n)
    memory.declare("sums", n, 1)
    memory.declare("O", n, d)
    for rows in memory.spans(n, b):
        sums = memory.allocate(rows.stop - rows.start, 1, 0)
        for keys in memory.spans(n, b):
            p = memory.allocate(sums.rows, keys.stop - keys.start, 0)
            for channels in memory.spans(d, depth):
                q, k = memory.load("Q", rows, channels), memory.load("K", keys, channels)
                memory.compute(steps.add_scores, p, q, k)
                memory.free(q, k)
            memory.compute(steps.multiply, p, factor=1 / sqrt(d))
            memory.compute(steps.exp, p)
            memory.compute(steps.add_row_sums, sums, p)
            memory.store(p, "P", rows, keys)
            memory.free(p)
        memory.store(sums, "sums", rows, _ONE)
        memory.free(sums)
    for rows in memory.spans(n, b):
        sums = memory.load("sums", rows, _ONE)
        for channels in memory.spans(d, depth):
            o = memory.allocate(sums.rows, channels.stop - channels.start, 0)
            for keys in memory.spans(n, b):
                p, v = memory.load("P", rows, keys), memory.load("V", keys, channels)
                memory.compute(steps.add_product, o, p, v)
                memory.free(p, v)
            memory.compute(steps.divide_rows, o, sums)
            memory.store(o, "O", rows, channels)
            memory.free(o)
        memory.free(sums)


def run_improved(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    """The same two phases with one tile that stays and columns and rows that stream, and a running maximum.

    Phase 1 writes scores (not exponentials) and each row's maximum and sum, phase 2 takes exp(score - maximum) of every
    column it reads: any scores are safe, for 2 N words more and not one per score.
    Tiles: rows x cols of S, out_rows x out_cols of O.
    """
    memory.declare("S", n, n)
    memory.declare("maxima", n, 1)
    memory.declare("sums", n, 1)
    memory.declare("O", n, d)
    for rows in memory.spans(n, tiles.rows):
        height = rows.stop - rows.start
        maxima, sums = memory.allocate(height, 1, -inf), memory.allocate(height, 1, 0)
        for keys in memory.spans(n, tiles.cols):
            s = score_tile(memory, rows, keys, d)
            memory.compute(steps.softmax_statistics, s, maxima, sums)
            memory.store(s, "S", rows, keys)
            memory.free(s)
        memory.store(maxima, "maxima", rows, _ONE)
        memory.store(sums, "sums", rows, _ONE)
        memory.free(maxima, sums)
    for rows in memory.spans(n, tiles.out_rows):
        maxima, sums = memory.load("maxima", rows, _ONE), memory.load("sums", rows, _ONE)
        for channels in memory.spans(d, tiles.out_cols):
            o = memory.allocate(maxima.rows, channels.stop - channels.start, 0)
            for key in memory.spans(n, 1):
                s, v = memory.load("S", rows, key), memory.load("V", key, channels)
                memory.compute(steps.shifted_exp, s, maxima)
                memory.compute(steps.add_product, o, s, v)
                memory.free(s, v)
            memory.compute(steps.divide_rows, o, sums)
            memory.store(o, "O", rows, channels)
            memory.free(o)
        memory.free(maxima, sums)
