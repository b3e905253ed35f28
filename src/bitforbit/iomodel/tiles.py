"""Tile sizes of each algorithm for a fast memory of M words: as published where they fit, else the largest that do.

Every function takes (N, d, M) and returns the tiles; it raises IoModelError where M is below the least memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from bitforbit.errors import IoModelError

LARGEST_HEAD = 1 << 16


@dataclass(frozen=True)
class Tiles:
    """Tile sizes; what the numbers mean is each algorithm's own.

    ``rows`` x ``cols`` is a tile of S = Q K^T (queries by keys), ``out_rows`` x ``out_cols`` one of the output.
    """

    rows: int
    cols: int
    out_rows: int
    out_cols: int

    def __str__(self) -> str:
        score = f"{self.rows} x {self.cols}"
        return score if self.out_rows == self.rows else f"{score}; {self.out_rows} x {self.out_cols}"


def check(n: int, d: int, memory: int, least: int, name: str) -> None:
    """Raise IoModelError for sizes out of range and for a memory below the least that the algorithm needs."""
    for what, value in (("N", n), ("d", d), ("M", memory)):
        if value < 1:
            raise IoModelError(f"{what}: expected at least 1, got {value}")
    if d > LARGEST_HEAD:
        raise IoModelError(f"d: expected at most {LARGEST_HEAD}, got {d}")
    if memory < least:
        raise IoModelError(f"{name}: expected a fast memory of at least {least} words for d = {d}, got {memory}")


def standard(n: int, d: int, memory: int) -> Tiles:
    """A product's output tile b x b stays while columns and rows of b words stream: b^2 + 2b <= M."""
    check(n, d, memory, least_standard(d), "standard")
    b = isqrt(memory + 1) - 1
    return Tiles(min(b, n), min(b, n), min(b, n), min(b, d))


def least_standard(d: int) -> int:
    """Three words: one of each factor and one of the product."""
    return 3


def flash1(n: int, d: int, memory: int) -> Tiles:
    """FlashAttention's Bc = ceil(M / 4d), Br = min(Bc, d) (arXiv 2205.14135, Algorithm 1, line 1).

    The paper's sizes make Q, K, V, O alone take up to M words, so Bc is lowered until they, S and the row statistics
    fit: 2 Bc d + 2 Br d + Br Bc + 2 Br <= M.
    """
    check(n, d, memory, least_flash1(d), "flash1")
    low, high = 1, min(n, -(-memory // (4 * d)))
    while low < high:  # what is needed grows with Bc
        cols = (low + high + 1) // 2
        low, high = (cols, high) if needed_flash1(d, min(cols, d), cols) <= memory else (low, cols - 1)
    return Tiles(min(low, d), low, min(low, d), d)


def needed_flash1(d: int, rows: int, cols: int) -> int:
    """Words of fast memory for FlashAttention-1 with Br = rows, Bc = cols."""
    return 2 * cols * d + 2 * rows * d + rows * cols + 2 * rows


def least_flash1(d: int) -> int:
    """One row each of Q, K, V, O, one score, two statistics."""
    return needed_flash1(d, 1, 1)


def flash2(n: int, d: int, memory: int) -> Tiles:
    """Q, O, two statistics and one column of S for Br queries, one row of K or V: Br (2d + 3) + d <= M."""
    check(n, d, memory, least_flash2(d), "flash2")
    rows = min(n, (memory - d) // (2 * d + 3))
    return Tiles(rows, 1, rows, d)


def least_flash2(d: int) -> int:
    """One query and one key."""
    return 3 * d + 3


def square(n: int, d: int, memory: int) -> Tiles:
    """B = floor(sqrt(M / 4)) (arXiv 2402.07443, Algorithm 1): three B x B tiles and row sums."""
    check(n, d, memory, least_square(d), "square")
    b = isqrt(memory // 4)
    return Tiles(min(b, n), min(b, n), min(b, n), min(b, d))


def least_square(d: int) -> int:
    """B = 1."""
    return 4


def square_improved(n: int, d: int, memory: int) -> Tiles:
    """One b x b tile stays, a column and a row stream, 2b statistics: b^2 + 4b <= M, so b is about sqrt(M) - 2."""
    check(n, d, memory, least_improved(d), "square_improved")
    b = isqrt(memory + 4) - 2
    return Tiles(min(b, n), min(b, n), min(b, n), min(b, d))


def least_improved(d: int) -> int:
    """b = 1."""
    return 5


def rectangular(n: int, d: int, memory: int) -> Tiles:
    """As :func:`square_improved`, but the output is cut into k equal strips, each tile as high as fits, with the k that
    moves least: no narrow rest where b does not divide d, and whole rows of O near M = d^2.
    """
    b = square_improved(n, d, memory).rows
    best: tuple[int, Tiles] | None = None
    for strips in range(1, d + 1):
        width = -(-d // strips)
        height = min(n, (memory - width) // (width + 3))
        if height < 1 or -(-d // width) != strips:
            continue
        moved = n * n * strips + n * d * -(-n // height)
        if best is None or moved < best[0]:
            best = moved, Tiles(b, b, height, width)
        elif n * n * strips > best[0]:
            break
    assert best is not None  # a strip of one column fits wherever b = 1 does
    return best[1]
