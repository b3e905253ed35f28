"""Attention of FP32 matrices with tiles that stay in the L1 cache, in two orders of loops.

``flash`` keeps queries and their output in the cache and streams keys and values; ``square`` keeps a tile of scores,
then a tile of the output (arXiv 2402.07443). The larger the head, the fewer queries fit with ``flash``, the more often
it reads keys and values again: below M = d^2 words of cache the model (bitforbit.iomodel) says that ``square`` moves
fewer words. This is the model made runnable, for experiments and benchmarks; models do not use it.
"""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import numpy.typing as npt

from bitforbit.cpu import _native
from bitforbit.cpu.caches import level_bytes
from bitforbit.cpu.isa import active
from bitforbit.errors import UsageError

Floats = npt.NDArray[np.float32]

ORDERS = ("flash", "square")
WIDTH = 64
"""Keys of a tile of scores, channels of a tile of the output."""
DEPTH = 16
"""Channels of keys, or rows of values, that are in use at a time."""
GROUP = 4
"""Queries of a tile come in multiples of this."""
_SHARE = 0.75
"""Of the cache, for tiles: the rest is for what streams past them."""
_SHARE_OF_NEXT, _LEAST_SQUARE = 0.125, 16
"""Of the next cache, for a strip of scores, past which keys and values stream; but no fewer rows than this."""


def implementation() -> str:
    """Name of the instruction set whose kernels would run now."""
    return _native.tiled_attention_implementation(active())


def tile_rows(
    order: str, channels: int, keys: int, cache_bytes: int | None = None, next_bytes: int | None = None
) -> int:
    """Queries of a tile for a cache of that size (this CPU's L1 data cache): a multiple of 4, at least 4.

    With ``square`` the scores of a tile's queries and all keys should stay in the next level (``next_bytes``; L2): they
    are read once for each strip of channels.
    """
    _check_order(order)
    words = int(_SHARE * (level_bytes(1) if cache_bytes is None else cache_bytes)) // 4
    if order == "flash":
        rows = (words - WIDTH * DEPTH) // (2 * channels + WIDTH)  # Q, O and scores; a piece of K or V
    else:
        rows = (words - WIDTH * DEPTH) // (WIDTH + DEPTH)  # a tile of scores or of O and a piece of Q or P; of K or V
        beyond = int(_SHARE_OF_NEXT * (level_bytes(2) if next_bytes is None else next_bytes)) // 4
        rows = min(rows, max(_LEAST_SQUARE, beyond // (-(-keys // WIDTH) * WIDTH)))
    return max(GROUP, rows // GROUP * GROUP)


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    order: str,
    *,
    scaling: float | None = None,
    rows: int | None = None,
    threads: int = 1,
) -> Floats:
    """softmax(scaling * q k^T) v for q ``[heads, queries, channels]``, k and v ``[heads, keys, channels]``, FP32.

    ``scaling`` is 1 / sqrt(channels) unless given, ``rows`` :func:`tile_rows`. The result depends neither on the number
    of threads nor on ``rows`` nor on the other queries; its last bits may differ between orders and instruction sets.
    Memory beside inputs and outputs: copies of one head's keys and values; per thread a tile, with ``square`` one of
    ``rows`` x keys. Raises UsageError.
    """
    _check_order(order)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3 or array.dtype != np.float32 or not array.size:
            raise UsageError(
                f"{name}: expected FP32 [heads, tokens, channels], not empty, got {array.dtype} {list(array.shape)}"
            )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise UsageError(
            f"expected k and v of one shape, and q with their heads and channels, got {q.shape}, {k.shape}, {v.shape}"
        )
    chosen = tile_rows(order, q.shape[2], k.shape[1]) if rows is None else rows
    if not 1 <= chosen <= 1 << 20:
        raise UsageError(f"rows: expected 1 to {1 << 20}, got {rows}")
    if threads < 1:
        raise UsageError(f"threads: expected at least 1, got {threads}")
    scale = 1 / sqrt(q.shape[2]) if scaling is None else scaling
    if not 0 < scale < inf:
        raise UsageError(f"scaling: expected a positive number, got {scaling}")
    out = np.empty(q.shape, np.float32)
    q, k, v = (np.ascontiguousarray(array) for array in (q, k, v))
    _native.tiled_attention(q, k, v, out, scale, order == "square", chosen, active(), threads)
    return out


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise UsageError(f"expected an order among {', '.join(ORDERS)}, got {order!r}")
