"""Matrices of FP16 and FP8 weights for the tests of tiles."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from bitforbit.cuda.tiles.kinds import F8_E4M3, F16, Elements, Kind
from helpers.tile_cases import SHAPES

NEW = (F16, F8_E4M3)
NUMBERS = {"F16": np.dtype(np.float16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
PATTERNS = {"F16": (256, 256), "F8_E4M3": (16, 16)}


def gaussian(kind: Kind, rows: int, cols: int, seed: int = 0, scale: float = 0.02) -> Elements:
    """Weights as of a trained layer."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)) * scale
    return values.astype(NUMBERS[kind.name]).view(f"u{kind.item_bytes}")


def with_exponents(kind: Kind, rows: int, cols: int, exponents: list[int], seed: int = 0) -> Elements:
    """Random signs and mantissas; exponents drawn from the list, each of them at least once if there is room."""
    random = np.random.default_rng(seed)
    drawn = random.choice(np.array(exponents), rows * cols)
    drawn[: len(exponents)] = exponents[: rows * cols]
    bits = len(kind.mantissa)
    sign, mantissa = random.integers(0, 2, rows * cols), random.integers(0, 1 << bits, rows * cols)
    total = 8 * kind.item_bytes - 1
    words = sign << total | random.permutation(drawn) << bits | mantissa
    return words.reshape(rows, cols).astype(f"u{kind.item_bytes}")


def cases(kind: Kind) -> dict[str, Elements]:
    """Hostile matrices by name."""
    last = kind.exponents - 1
    unsigned = np.dtype(f"u{kind.item_bytes}")
    nan = {"F16": [0x7C00, 0xFC00, 0x7C01, 0xFFFF], "F8_E4M3": [0x7F, 0xFF, 0x7E, 0xFE]}[kind.name]
    minus_zero = 1 << (8 * kind.item_bytes - 1)
    specials = gaussian(kind, 32, 256, 3).copy()
    specials.reshape(-1)[::37] = np.resize(np.array([*nan, 0, minus_zero, 1, minus_zero | 1], unsigned), 222)
    patterns = np.arange(np.prod(PATTERNS[kind.name])).astype(unsigned)
    return {
        **{f"gaussian-{rows}x{cols}": gaussian(kind, rows, cols, rows) for rows, cols in SHAPES},
        "gaussian-47x449": gaussian(kind, 47, 449, 10),
        "scaled-64x512": gaussian(kind, 64, 512, 9, 80.0),
        "all-patterns": patterns.reshape(PATTERNS[kind.name]),
        "all-patterns-many-times": np.random.default_rng(0).permutation(np.tile(patterns, 3)).reshape(-1, 48),
        "zeros": np.zeros((17, 65), unsigned),
        "minus-zeros": np.full((16, 64), minus_zero, unsigned),
        "nan": np.resize(np.array(nan, unsigned), (16, 70)),
        "one-weight": np.array([[minus_zero | 0x5A]], unsigned),
        "no-escape": with_exponents(kind, 32, 128, [*range(4, 12)]),
        "window-at-0": with_exponents(kind, 32, 128, [*range(8), 8], 1),
        "window-at-the-end": with_exponents(kind, 32, 128, [*range(last - 7, last + 1), 0, 1], 2),
        "odd-window": with_exponents(kind, 32, 128, [*range(5, 13)], 2),
        "most-escape": with_exponents(kind, 40, 200, [*range(0, last + 1, 5)], 5),
        "specials": specials,
    }  # fmt: skip
