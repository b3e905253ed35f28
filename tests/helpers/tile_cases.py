"""Matrices for the tests of the tile layout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]

SHAPES = [(1, 1), (1, 64), (15, 63), (16, 64), (17, 65), (16, 8), (40, 72), (33, 1000), (5, 331)]


def gaussian(rows: int, cols: int, seed: int = 0) -> Words:
    """Weights as of a trained layer, rounded to BF16 by cutting."""
    values = np.random.default_rng(seed).standard_normal((rows, cols), np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def with_exponents(rows: int, cols: int, exponents: list[int], seed: int = 0) -> Words:
    """Random signs and mantissas; exponents drawn from the list, each of them at least once if there is room."""
    random = np.random.default_rng(seed)
    drawn = random.choice(np.array(exponents), rows * cols)
    drawn[: len(exponents)] = exponents[: rows * cols]
    rests = random.integers(0, 256, rows * cols)
    words = (rests >> 7) << 15 | random.permutation(drawn) << 7 | rests & 0x7F
    return words.reshape(rows, cols).astype(np.uint16)


def cases() -> dict[str, Words]:
    """Hostile matrices by name."""
    window = list(range(120, 128))
    specials = gaussian(32, 256, 3)
    specials.reshape(-1)[::37] = np.resize(
        np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 1, 0x8001], np.uint16), 222
    )
    return {
        **{f"gaussian-{rows}x{cols}": gaussian(rows, cols, rows) for rows, cols in SHAPES},
        "gaussian-64x512": gaussian(64, 512, 9),
        "gaussian-47x449": gaussian(47, 449, 10),
        "all-patterns": np.arange(1 << 16).astype(np.uint16).reshape(256, 256),
        "zeros": np.zeros((17, 65), np.uint16),
        "minus-zeros": np.full((16, 64), 0x8000, np.uint16),
        "constant": np.full((31, 130), 0x3F80, np.uint16),
        "nan-payloads": with_exponents(16, 70, [255]),
        "one-weight": np.array([[0xBF81]], np.uint16),
        "no-escape": with_exponents(32, 128, window),
        "window-at-0": with_exponents(32, 128, [*range(8), 8], 1),
        "window-at-248": with_exponents(32, 128, [*range(248, 256)], 2),
        "window-at-248-and-escapes": with_exponents(32, 128, [*range(248, 256), 247, 0, 255, 254], 2),
        "64-escaped": with_exponents(32, 128, [*window * 200, *range(64)], 3),
        "65-escaped": with_exponents(32, 128, [*window * 200, *range(65)], 4),
        "most-escape": with_exponents(40, 200, [*range(0, 256, 9)], 5),
        "specials": specials,
    }  # fmt: skip
