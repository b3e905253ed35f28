"""Words moved by each algorithm, in closed form: what the simulator counts, to the word, for any N, d, M and tiles.

With x/b rounded up to whole tiles; the leading terms are those of tiles much smaller than N and d.
"""

from __future__ import annotations

from bitforbit.iomodel.tiles import Tiles


def _tiles(total: int, size: int) -> int:
    return -(-total // size)


def standard(n: int, d: int, memory: int, t: Tiles) -> int:
    """Leading: 4 N^2 d / sqrt(M) + 4 N^2; 3 N^2 instead of 4 where a row of S fits in fast memory."""
    softmax = 2 * n * n if n + 2 <= memory else 3 * n * n
    scores = n * d * (_tiles(n, t.rows) + _tiles(n, t.cols)) + n * n
    return scores + softmax + _output(n, d, t)


def flash1(n: int, d: int, memory: int, t: Tiles) -> int:
    """Leading: 3 N^2 d / Bc = 12 N^2 d^2 / M with Bc = M / 4d. 2 N d once for K and V, N d + 2 N to begin with."""
    return 2 * n * d + (n * d + 2 * n) + _tiles(n, t.cols) * (3 * n * d + 4 * n)


def flash2(n: int, d: int, memory: int, t: Tiles) -> int:
    """Leading: 2 N^2 d / Br = 4 N^2 d^2 / M; Q and O once."""
    return 2 * n * d + 2 * n * d * _tiles(n, t.rows)


def square(n: int, d: int, memory: int, t: Tiles) -> int:
    """4 N^2 d / B + N^2 + N d + 2 N where B divides N and d; leading: 8 N^2 d / sqrt(M) + N^2."""
    return 2 * n * d * _tiles(n, t.rows) + n * n + 2 * n + _output(n, d, t)


def improved(n: int, d: int, memory: int, t: Tiles) -> int:
    """Leading: 4 N^2 d / sqrt(M) + N^2; 4 N for the row statistics."""
    scores = n * d * (_tiles(n, t.rows) + _tiles(n, t.cols)) + n * n
    return scores + 4 * n + _output(n, d, t)


def _output(n: int, d: int, t: Tiles) -> int:
    """O = P V in tiles: P once for each column of tiles, V once for each row of tiles, O written."""
    return n * n * _tiles(d, t.out_cols) + n * d * _tiles(n, t.out_rows) + n * d
