"""The product in the kernels' order of summation, as plainly as it can be written.

How a GPU's matrix instruction sums is not documented. :func:`mma` is what the emulation of the tests defines in its
place, so results are bit-equal there; on a GPU they are close.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import numpy.typing as npt

from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.tiles.layout import TILE_COLS

Words = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


def linear(x: Words, weights: Words, order: Order, bias: Words | None = None) -> Words:
    """BF16 words [tokens, rows] of x [tokens, cols] times weights [rows, cols] transposed, plus bias [rows]."""
    a, b = (_floats(_padded(words)) for words in (x, weights))
    parts = []
    with np.errstate(all="ignore"):
        for begin, end in order.ranges:
            part = np.zeros((len(x), len(weights)), np.float32)
            for k in range(begin, end, order.k_step):
                part = mma(part, a[:, k : k + order.k_step], b[:, k : k + order.k_step])
            parts.append(part)
        total = add_splits(parts, order)
        if bias is not None:
            total = (_rounded(total) if order.bias_rounded else total) + _floats(bias)
        return to_bf16(total)


def add_splits(parts: list[Floats], order: Order) -> Floats:
    """The sum over the splits."""
    if order.partials != "F32" and len(parts) > 1:
        parts = [_rounded(part) for part in parts]

    def add(a: Floats, b: Floats) -> Floats:
        return _rounded(a + b) if order.partials == "running BF16" else a + b

    if order.reduction in ("ascending", "descending"):
        return reduce(add, parts if order.reduction == "ascending" else parts[::-1])
    while len(parts) > 1:
        half = -(-len(parts) // 2)
        if order.reduction == "neighbours":
            parts = [reduce(add, parts[i : i + 2]) for i in range(0, len(parts), 2)]
        else:
            parts = [reduce(add, parts[i::half]) for i in range(half)]
    return parts[0]


def mma(sums: Floats, a: Floats, b: Floats) -> Floats:
    """sums [m, n] + a [m, k] times b [n, k] transposed: in FP64, product after product, rounded to FP32 once."""
    exact = sums.astype(np.float64)
    for k in range(a.shape[1]):
        exact = exact + a[:, k, None].astype(np.float64) * b[None, :, k].astype(np.float64)
    return exact.astype(np.float32)


def to_bf16(values: Floats) -> Words:
    """To the nearest, ties to even; NaNs become 0x7FFF."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _rounded(values: Floats) -> Floats:
    return _floats(to_bf16(values))


def _floats(words: Words) -> Floats:
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _padded(words: Words) -> Words:
    return np.pad(words, ((0, 0), (0, -words.shape[1] % TILE_COLS)))
