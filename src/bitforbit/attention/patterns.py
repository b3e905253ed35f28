"""Which blocks of keys a block of queries reads: layouts for block-sparse attention.

Each builder returns bool ``[B, H, q blocks, kv blocks]`` (1 where all rows or heads share a layout), never more than
what is visible, always the blocks of the queries' own tokens: so every query sees at least itself.

=============  ============================================================================================
dense          everything: attention as it is
local          the nearest blocks (sliding window)
local_global   the nearest and the first ones (Longformer, arXiv 2004.05150; "sinks", arXiv 2309.17453)
strided        the nearest, and every n-th before (Child et al., arXiv 1904.10509, section 4.2)
butterfly      blocks whose indices differ in one bit (Pixelated Butterfly, arXiv 2112.00029, section 3.2)
random         the nearest, the first, and random ones (BigBird, arXiv 2007.14062, section 2)
topk           those whose mean key fits the mean query best (as MoBA, arXiv 2502.13189, rates blocks), per KV head
=============  ============================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitforbit.attention.grid import Grid
from bitforbit.errors import AttentionError

PATTERNS = ("dense", "local", "local_global", "strided", "butterfly", "random", "topk")


def dense(grid: Grid) -> Tensor:
    """All blocks."""
    return grid.visible()[None, None]


def local(grid: Grid, window: int) -> Tensor:
    """The nearest ``window`` blocks, the queries' own among them; without a causal mask as many after them."""
    _at_least("window", window, 1)
    return _finish(grid, grid.distance().abs() < window)


def local_global(grid: Grid, window: int, global_blocks: int = 1) -> Tensor:
    """The nearest ``window`` blocks and the first ``global_blocks``; without a causal mask those read everything."""
    _at_least("global_blocks", global_blocks, 0)
    kept = (grid.columns() < global_blocks).expand(grid.q_blocks, -1)
    if not grid.causal:
        kept = kept | (torch.arange(grid.q_blocks)[:, None] < global_blocks)
    return local(grid, window) | _finish(grid, kept)


def strided(grid: Grid, stride: int) -> Tensor:
    """The nearest ``stride`` blocks, and every block at a distance that is a multiple of ``stride``."""
    return local(grid, stride) | _finish(grid, grid.distance() % stride == 0)


def butterfly(grid: Grid, max_stride: int, global_blocks: int = 0) -> Tensor:
    """Blocks i and j of which i xor j is a power of two below ``max_stride``: the flat block butterfly.

    ``global_blocks``: the first ones too, which stand for the paper's low-rank term.
    """
    _at_least("max_stride", max_stride, 1)
    _at_least("global_blocks", global_blocks, 0)
    columns = grid.columns()
    differing = (grid.distance() + columns).bitwise_xor(columns)
    one_bit = (differing & (differing - 1)) == 0
    return _finish(grid, (one_bit & (differing < max_stride)) | (columns < global_blocks))


def random(grid: Grid, count: int, window: int = 1, global_blocks: int = 1, seed: int = 0) -> Tensor:
    """The nearest ``window``, the first ``global_blocks``, and ``count`` others of those visible, drawn once."""
    _at_least("count", count, 0)
    kept = local_global(grid, window, global_blocks)
    draws = torch.rand(1, 1, grid.q_blocks, grid.kv_blocks, generator=torch.Generator().manual_seed(seed))
    return _best(grid, draws, kept, kept.sum(-1) + count)


def topk(grid: Grid, q: Tensor, k: Tensor, count: int | Tensor, global_blocks: int = 1) -> Tensor:
    """``count`` blocks per block of queries, one layout per KV head: ``[B, Hkv, q blocks, kv blocks]``.

    ``q`` is ``[B, Hq, Lq, D]``, ``k`` ``[B, Hkv, Lk, D]``; ``count`` may be int64 ``[q blocks]``. Blocks are rated by
    the softmax over blocks of mean query times mean key, averaged over the query heads that share the keys. The own and
    the first ``global_blocks`` are always among them.
    """
    _at_least("global_blocks", global_blocks, 0)
    counts = torch.as_tensor(count, device=q.device)
    _at_least("count", int(counts.min()), 1)
    batch, kv_heads = k.shape[:2]
    q_means, k_means = block_means(q, grid.block), block_means(k, grid.block)
    q_means = q_means.view(batch, kv_heads, -1, *q_means.shape[2:])  # [B, Hkv, queries per head, q blocks, D]
    scores = q_means @ k_means[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = grid.visible(q.device)
    ratings = scores.masked_fill(~visible, -math.inf).softmax(-1).mean(2)
    first = grid.columns(q.device) < global_blocks
    kept = _finish(grid, first.expand(grid.q_blocks, -1).expand(batch, kv_heads, -1, -1))
    return _best(grid, ratings, kept, counts)


def block_means(tokens: Tensor, block: int) -> Tensor:
    """Means over blocks of tokens in FP32, ``[B, H, L, D]`` to ``[B, H, blocks, D]``; the last block may be short."""
    whole = tokens.shape[2] // block * block
    means = tokens[:, :, :whole].unflatten(2, (-1, block)).float().mean(3)
    if whole == tokens.shape[2]:
        return means
    return torch.cat([means, tokens[:, :, whole:].float().mean(2, keepdim=True)], 2)


def with_density(
    name: str, grid: Grid, density: float, q: Tensor | None = None, k: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The layout of a family that comes closest to a share of the visible blocks, without exceeding it if it can.

    What is always kept (the queries' own blocks; the first one in most families) may exceed a small share. ``topk``
    and ``random`` keep the share in every row, rounded up; others as a whole, by the one parameter that they have.
    Raises AttentionError for names and shares that do not exist, and for ``topk`` without ``q`` and ``k``.
    """
    if name not in PATTERNS:
        raise AttentionError(f"pattern: expected one of {', '.join(PATTERNS)}, got {name!r}")
    if not 0 < density <= 1:
        raise AttentionError(f"density: expected more than 0 and at most 1, got {density!r}")
    if name == "dense" or density == 1:
        return dense(grid)
    if name == "topk":
        if q is None or k is None:
            raise AttentionError("pattern 'topk' rates blocks by queries and keys: expected q and k, got none")
        return topk(grid, q, k, _counts(grid, density).to(q.device))
    device = None if q is None else q.device
    return _fixed_with_density(name, grid, density, seed).to(device)


@functools.lru_cache(maxsize=64)
def _fixed_with_density(name: str, grid: Grid, density: float, seed: int) -> Tensor:
    """Layouts that depend on sizes only: kept, as every layer of a model asks for the same one."""
    if name == "random":
        kept = local_global(grid, 1)
        draws = torch.rand(1, 1, grid.q_blocks, grid.kv_blocks, generator=torch.Generator().manual_seed(seed))
        return _best(grid, draws, kept, _counts(grid, density))
    families: dict[str, tuple[Callable[[Grid, int], Tensor], list[int]]] = {
        "local": (local, list(range(1, grid.kv_blocks + 1))),
        "local_global": (local_global, list(range(1, grid.kv_blocks + 1))),
        # A shorter stride than the square root keeps more columns than it saves in the window.
        "strided": (strided, list(range(max(1, math.isqrt(grid.kv_blocks)), grid.kv_blocks + 1))),
        "butterfly": (
            functools.partial(butterfly, global_blocks=1),
            [2**n for n in range(grid.kv_blocks.bit_length() + 1)],
        ),
    }
    build, parameters = families[name]
    low, high = 0, len(parameters) - 1  # density grows with the parameter
    while low < high:
        middle = (low + high + 1) // 2
        if grid.density(build(grid, parameters[middle])) <= density:
            low = middle
        else:
            high = middle - 1
    return build(grid, parameters[low])


def _finish(grid: Grid, kept: Tensor) -> Tensor:
    """With the queries' own blocks, without invisible ones, as ``[B, H, q blocks, kv blocks]``."""
    layout = (kept | grid.own(kept.device)) & grid.visible(kept.device)
    return layout if layout.ndim == 4 else layout[None, None]


def _best(grid: Grid, ratings: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """What is kept, and the best rated of the other visible blocks up to ``counts`` ``[..., q blocks]`` in each row."""
    ratings = ratings.masked_fill(kept, math.inf).masked_fill(~grid.visible(ratings.device), -math.inf)
    ranks = ratings.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ((ranks < counts[..., None]) | kept) & grid.visible(ratings.device)


def _counts(grid: Grid, density: float) -> Tensor:
    """That share of each row's visible blocks, rounded up, int64 ``[q blocks]``."""
    shares = grid.visible().sum(-1).double() * density
    return (shares - 1e-9).ceil().long()  # a product that should be a whole number may lie above it


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise AttentionError(f"{name}: expected at least {least}, got {value!r}")
