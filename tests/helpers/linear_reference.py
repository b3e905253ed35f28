"""The orders of summation of bitforbit.cpu.linear in numpy: exact arithmetic, one rounding at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U16 = npt.NDArray[np.uint16]

TINY = np.float32(2.0**-126)  # the smallest normal number


def from_bf16(words: U16) -> F32:
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: F32) -> U16:
    """Rounded to nearest even; NaN becomes 0x7FC0."""
    words = values.view(np.uint32)
    rounded = ((words.astype(np.uint64) + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def flush(values: F32) -> F32:
    """Denormals become zeros of their sign."""
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c rounded once to nearest even; denormal inputs and results are zeros (x86: FTZ and DAZ)."""
    with np.errstate(all="ignore"):
        product = flush(a).astype(np.float64) * flush(b)  # exact: 24 + 24 bits
        addend = flush(c).astype(np.float64)
        total = np.asarray(product + addend)
        other = total - product
        lost = (product - (total - other)) + (addend - other)  # exact (TwoSum)
        # Round the sum to odd, so that the second rounding cannot be wrong.
        words = total.view(np.int64)
        step = np.where((lost > 0) == (total > 0), 1, -1)
        inexact = np.isfinite(total) & (lost != 0) & (words & 1 == 0)
        total = np.where(inexact, words + step, words).view(np.float64)
        # Results count as tiny by their value after rounding to 24 bits without a limit to the exponent.
        tiny = np.abs((total * 2.0**100).astype(np.float32)) < np.float32(2.0**-26)
        return np.where(tiny, np.copysign(np.float32(0), total.astype(np.float32)), total.astype(np.float32))


def fma_kept(a: F32, b: F32, c: F32) -> F32:
    """a * b + c rounded once to nearest even; denormals count. a and b are BF16 values."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b  # exact
        addend = c.astype(np.float64)
        total = np.asarray(product + addend)
        other = total - product
        lost = (product - (total - other)) + (addend - other)
        words = total.view(np.int64)
        step = np.where((lost > 0) == (total > 0), 1, -1)
        inexact = np.isfinite(total) & (lost != 0) & (words & 1 == 0)
        return np.where(inexact, words + step, words).view(np.float64).astype(np.float32)


def add(a: F32, b: F32) -> F32:
    return fma(np.ones_like(a), a, b)


def lanes(weight: U16, x: F32) -> F32:
    """Sums [tokens, rows] in the order of family ``lanes``; weight is [rows, cols] BF16, x [tokens, cols]."""
    rows, cols = weight.shape
    padding = ((0, 0), (0, -cols % 32))
    w = np.pad(from_bf16(weight), padding).reshape(1, rows, -1, 16, 2)
    v = np.pad(x, padding).reshape(len(x), 1, -1, 16, 2)
    lane = np.zeros((len(x), rows, 16), np.float32)
    for chunk in range(w.shape[2]):
        for k in (1, 0):
            lane = fma(*np.broadcast_arrays(w[:, :, chunk, :, k], v[:, :, chunk, :, k]), lane)
    for n in (8, 4, 2, 1):
        lane = add(lane[..., :n], lane[..., n : 2 * n])
    return lane[..., 0]


def lanes_pairwise(weight: U16, x: F32, k_block: int = 0) -> F32:
    """Sums [tokens, rows] in the order of family ``lanes_pairwise``."""
    rows, cols = weight.shape
    padding = ((0, 0), (0, -cols % 32))
    w = np.pad(from_bf16(weight), padding).reshape(1, rows, -1, 16, 2)
    v = np.pad(x, padding).reshape(len(x), 1, -1, 16, 2)
    lane = np.zeros((len(x), rows, 16), np.float32)
    for chunk in range(w.shape[2]):
        for k in (1, 0):
            lane = fma_kept(*np.broadcast_arrays(w[:, :, chunk, :, k], v[:, :, chunk, :, k]), lane)
    with np.errstate(all="ignore"):
        lane = lane[..., :8] + lane[..., 8:]
        for _ in range(3):
            lane = lane[..., 0::2] + lane[..., 1::2]
    return lane[..., 0]


def in_blocks(weight: U16, x: F32, k_block: int, unit: int, add_columns: Callable[[F32, F32, F32], F32]) -> F32:
    """Sums [tokens, rows], ``unit`` columns after the other, in K blocks whose sums are added in order.

    add_columns takes sums [tokens, rows] and the next columns of weights [1, rows, unit] and of x [tokens, 1, unit].
    """
    rows, cols = weight.shape
    padding = ((0, 0), (0, -cols % unit))
    w, v = np.pad(from_bf16(weight), padding)[None], np.pad(x, padding)[:, None]
    block = -(-k_block // unit) * unit or cols
    total = None
    for begin in range(0, cols, block):
        acc = np.zeros((len(x), rows), np.float32)
        for k in range(begin, min(begin + block, cols), unit):
            acc = add_columns(acc, w[:, :, k : k + unit], v[:, :, k : k + unit])
        with np.errstate(all="ignore"):
            total = acc if total is None else total + acc
    return total


def vdpbf16(weight: U16, x: F32, k_block: int, fma: Callable[[F32, F32, F32], F32] = fma) -> F32:
    """Sums [tokens, rows] in the order of family ``vdpbf16``."""

    def pair(acc: F32, w: F32, v: F32) -> F32:
        for k in (1, 0):
            acc = fma(*np.broadcast_arrays(w[..., k], v[..., k]), acc)
        return acc

    return in_blocks(weight, x, k_block, 2, pair)


def vdpbf16_emulated(weight: U16, x: F32, k_block: int) -> F32:
    """Sums [tokens, rows] in the order of family ``vdpbf16_emulated``."""
    return vdpbf16(weight, x, k_block, fma_kept)


def tdpbf16(weight: U16, x: F32, k_block: int) -> F32:
    """Sums [tokens, rows] in the order of family ``tdpbf16``."""

    def step(acc: F32, w: F32, v: F32) -> F32:
        parity = [np.zeros_like(acc), np.zeros_like(acc)]
        for k in range(32):
            parity[k % 2] = fma(*np.broadcast_arrays(w[..., k], v[..., k]), parity[k % 2])
        return add(acc, add(*parity))

    return in_blocks(weight, x, k_block, 32, step)


REFERENCES = {
    "lanes": lambda weight, x, k_block: lanes(weight, x),
    "lanes_pairwise": lanes_pairwise,
    "vdpbf16": vdpbf16,
    "vdpbf16_emulated": vdpbf16_emulated,
    "tdpbf16": tdpbf16,
}
"""Family -> function of (weight, x, k_block)."""


def same_floats(got: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> bool:
    """Bitwise equal, but for what kind of NaN it is (uint16 is BF16, else float32)."""
    as_float = from_bf16 if got.dtype == np.uint16 else np.asarray
    word = np.uint16 if got.dtype == np.uint16 else np.uint32
    nan = np.isnan(as_float(expected))
    return bool(np.array_equal(nan, np.isnan(as_float(got)))) and bool(
        np.array_equal(got.view(word)[~nan], expected.view(word)[~nan])
    )
