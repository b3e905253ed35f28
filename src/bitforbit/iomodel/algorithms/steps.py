"""Arithmetic on blocks, in place, as the algorithms ask for it; statistics of a row are [rows, 1] columns.

Names: q, k, v pieces of the inputs, s scores, p weights, o output; maxima and sums are running
ones, by row.
"""

from __future__ import annotations

import numpy as np

from bitforbit.iomodel.memory import Array


def add_product(out: Array, a: Array, b: Array) -> None:
    """out += a b."""
    out += a @ b


def add_scores(s: Array, q: Array, k: Array) -> None:
    """s += q k^T."""
    s += q @ k.T


def multiply(x: Array, *, factor: float) -> None:
    """x *= factor."""
    x *= factor


def exp(x: Array) -> None:
    """x = exp(x), unshifted."""
    np.exp(x, out=x)


def add_row_sums(sums: Array, p: Array) -> None:
    """sums += row sums of p."""
    sums += p.sum(axis=1, keepdims=True)


def divide_rows(o: Array, sums: Array) -> None:
    """o = o / sums by rows."""
    o /= sums


def softmax_statistics(s: Array, maxima: Array, sums: Array) -> None:
    """Take the scores s into the running maxima, and exp(s - maxima) into the running sums."""
    new = np.maximum(maxima, s.max(axis=1, keepdims=True))
    sums *= np.exp(maxima - new)
    sums += np.exp(s - new).sum(axis=1, keepdims=True)
    maxima[:] = new


def softmax_weights(s: Array, maxima: Array, sums: Array) -> None:
    """s = exp(s - maxima) / sums: scores become weights once the statistics are final."""
    s -= maxima
    np.exp(s, out=s)
    s /= sums


def shifted_exp(s: Array, maxima: Array) -> None:
    """s = exp(s - maxima)."""
    s -= maxima
    np.exp(s, out=s)


def online_softmax(s: Array, maxima: Array, sums: Array, o: Array) -> None:
    """Scores become weights; maxima, sums and the unnormalised o follow the new maximum (2307.08691, lines 8-10)."""
    new = np.maximum(maxima, s.max(axis=1, keepdims=True))
    correction = np.exp(maxima - new)
    sums *= correction
    o *= correction
    s -= new
    np.exp(s, out=s)
    sums += s.sum(axis=1, keepdims=True)
    maxima[:] = new


def flash1_update(s: Array, maxima: Array, sums: Array, o: Array, v: Array) -> None:
    """FlashAttention-1, Algorithm 1, lines 10-13: o stays normalised; s is used up."""
    tile_m = s.max(axis=1, keepdims=True)
    s -= tile_m
    np.exp(s, out=s)
    new = np.maximum(maxima, tile_m)
    old_share, tile_share = sums * np.exp(maxima - new), np.exp(tile_m - new)
    total = old_share + tile_share * s.sum(axis=1, keepdims=True)
    o *= old_share
    o += tile_share * (s @ v)
    o /= total
    maxima[:], sums[:] = new, total
