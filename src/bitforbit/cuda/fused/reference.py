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


def linear(x: Words, weights: Words, order: Order, bias: Words | Floats | None = None, outputs: str = "BF16") -> Words:
    """Words [tokens, rows] of x [tokens, cols] times weights [rows, cols] transposed, plus bias [rows].

    All are BF16 or FP16 words, as ``outputs`` says; a bias may also be FP32.
    """
    a, b = (_floats(_padded(words), outputs) for words in (x, weights))
    parts = []
    with np.errstate(all="ignore"):
        for begin, end in order.ranges:
            part = np.zeros((len(x), len(weights)), np.float32)
            for k in range(begin, end, order.k_step):
                part = mma(part, a[:, k : k + order.k_step], b[:, k : k + order.k_step])
            parts.append(part)
        total = add_splits(parts, order, outputs)
        if bias is not None:
            added = bias if bias.dtype == np.float32 else _floats(bias.view(np.uint16), outputs)
            total = (_rounded(total, outputs) if order.bias_rounded else total) + added
        return to_words(total, outputs)


def add_splits(parts: list[Floats], order: Order, outputs: str = "BF16") -> Floats:
    """The sum over the splits."""
    if order.partials != "F32" and len(parts) > 1:
        parts = [_rounded(part, outputs) for part in parts]

    def add(a: Floats, b: Floats) -> Floats:
        return _rounded(a + b, outputs) if order.partials == "running BF16" else a + b

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


def to_f16(values: Floats) -> Words:
    """To the nearest, ties to even; NaNs become 0x7FFF."""
    with np.errstate(over="ignore"):
        return np.where(np.isnan(values), 0x7FFF, values.astype(np.float16).view(np.uint16)).astype(np.uint16)


def to_words(values: Floats, outputs: str) -> Words:
    """Rounded to BF16 or FP16."""
    return to_f16(values) if outputs == "F16" else to_bf16(values)


def bf16_of_f8(elements: npt.NDArray[np.uint8]) -> Words:
    """E4M3 as BF16 words, all values exact; NaNs become 0x7FFF."""
    sign, exponent, mantissa = elements >> 7, elements >> 3 & 15, elements & 7
    normal = (8 + mantissa) * np.exp2(exponent - 10.0)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal) * np.where(sign == 1, -1.0, 1.0)
    return to_bf16(np.where(elements & 0x7F == 0x7F, np.nan, value).astype(np.float32))


def _rounded(values: Floats, outputs: str) -> Floats:
    return _floats(to_words(values, outputs), outputs)


def _floats(words: Words, outputs: str = "BF16") -> Floats:
    if outputs == "F16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _padded(words: Words) -> Words:
    return np.pad(words, ((0, 0), (0, -words.shape[1] % TILE_COLS)))
