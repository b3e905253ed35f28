"""FlashAttention: S never leaves fast memory. Two orders of the loops."""

from __future__ import annotations

from math import inf, sqrt

from bitforbit.iomodel.algorithms import steps
from bitforbit.iomodel.memory import TwoLevelMemory
from bitforbit.iomodel.tiles import Tiles

_ONE = slice(0, 1)


def run_keys_outside(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    """FlashAttention-1 (arXiv 2205.14135, Algorithm 1): K and V stay; Q, O and statistics come and go.

    Tiles: rows = Br, cols = Bc. Line 2's first values of O, sums and maxima are written to slow memory, and counted.
    """
    memory.declare("O", n, d)
    memory.declare("sums", n, 1)
    memory.declare("maxima", n, 1)
    channels = slice(0, d)
    for rows in memory.spans(n, tiles.rows):
        height = rows.stop - rows.start
        first = (("O", channels, memory.allocate(height, d, 0)), ("sums", _ONE, memory.allocate(height, 1, 0)),
                 ("maxima", _ONE, memory.allocate(height, 1, -inf)))  # fmt: skip
        for name, cols, block in first:
            memory.store(block, name, rows, cols)
            memory.free(block)
    for keys in memory.spans(n, tiles.cols):
        k, v = memory.load("K", keys, channels), memory.load("V", keys, channels)
        for rows in memory.spans(n, tiles.rows):
            q, o = memory.load("Q", rows, channels), memory.load("O", rows, channels)
            sums, maxima = memory.load("sums", rows, _ONE), memory.load("maxima", rows, _ONE)
            s = memory.allocate(q.rows, k.rows, 0)
            memory.compute(steps.add_scores, s, q, k)
            memory.compute(steps.multiply, s, factor=1 / sqrt(d))
            memory.compute(steps.flash1_update, s, maxima, sums, o, v)
            memory.store(o, "O", rows, channels)
            memory.store(sums, "sums", rows, _ONE)
            memory.store(maxima, "maxima", rows, _ONE)
            memory.free(q, o, sums, maxima, s)
        memory.free(k, v)


def run_queries_outside(memory: TwoLevelMemory, n: int, d: int, tiles: Tiles) -> None:
    """FlashAttention-2's order (arXiv 2307.08691, Algorithm 1): Q, O, maxima, sums stay; keys, then values, stream.

    Tiles: rows = Br, cols = 1: a key and its value take turns in the same d words.
    """
    memory.declare("O", n, d)
    channels = slice(0, d)
    for rows in memory.spans(n, tiles.rows):
        q = memory.load("Q", rows, channels)
        o = memory.allocate(q.rows, d, 0)
        maxima, sums = memory.allocate(q.rows, 1, -inf), memory.allocate(q.rows, 1, 0)
        for keys in memory.spans(n, tiles.cols):
            k = memory.load("K", keys, channels)
            s = memory.allocate(q.rows, k.rows, 0)
            memory.compute(steps.add_scores, s, q, k)
            memory.free(k)
            memory.compute(steps.multiply, s, factor=1 / sqrt(d))
            memory.compute(steps.online_softmax, s, maxima, sums, o)
            v = memory.load("V", keys, channels)
            memory.compute(steps.add_product, o, s, v)
            memory.free(v, s)
        memory.compute(steps.divide_rows, o, sums)
        memory.store(o, "O", rows, channels)
        memory.free(q, o, maxima, sums)
