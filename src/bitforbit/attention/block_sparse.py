"""Block-sparse attention: time and memory traffic fall with the share of blocks that a layout keeps.

FlashAttention, arXiv 2205.14135, section 3.3. Two paths, both exact for the layout (what is left out is not seen, what
is kept is as torch computes it): on CUDA devices flex_attention, compiled; elsewhere the keys that a block of queries
keeps are put side by side and go through scaled_dot_product_attention (SDPA). A layout that leaves nothing out is
SDPA's own causal attention, bit for bit. The plain version is ``flash.attention(..., layout=...)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bitforbit.attention import shapes
from bitforbit.attention.grid import Grid
from bitforbit.errors import AttentionError

BACKENDS = ("gather", "flex")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    grid: Grid,
    *,
    scaling: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Outputs ``[B, Hq, Lq, Dv]`` in the dtype of ``q``. Differentiable ("flex" on a CPU is not).

    ``q`` is ``[B, Hq, Lq, D]``, ``k`` and ``v`` are ``[B, Hkv, Lk, D or Dv]``; ``layout`` is bool ``[1 or B, 1, Hkv or
    Hq, q blocks, kv blocks]`` of ``grid``, which also says whether attention is causal. A query all of whose blocks are
    left out gets zeros. ``backend``: "gather" or "flex", by the device unless given. Raises AttentionError for what
    does not fit.
    """
    layout = _checked(q, k, v, layout, grid)
    if backend not in (None, *BACKENDS):
        raise AttentionError(f"backend: expected 'gather', 'flex' or None, got {backend!r}")
    if backend is None and grid.offset == 0 and bool((layout | ~grid.visible(q.device)).all()):
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=grid.causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    if (backend or ("flex" if q.is_cuda else "gather")) == "flex":
        return _flex(q, k, v, layout, grid, scaling)
    return _gather(q, k, v, layout, grid, scaling)


def block_mask(layout: Tensor, grid: Grid) -> BlockMask:
    """A layout ``[B, H, q blocks, kv blocks]`` for flex_attention, H being 1 or the number of query heads.

    Blocks that the causal mask leaves whole are marked as full, so that it is evaluated in the others only. The mask
    function knows the layout too: what takes it without the blocks (flex_attention outside of torch.compile) sees the
    same tokens.
    """
    grid.check(layout)
    layout = layout & grid.visible(layout.device)
    full = layout & grid.full(layout.device)
    # Tensors, not numbers: another length is no reason to compile again.
    offset = torch.tensor(grid.offset if grid.causal else grid.kv_tokens, device=layout.device)
    rows, heads, block = layout.shape[0] > 1, layout.shape[1] > 1, grid.block

    def kept(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        in_layout = layout[b if rows else 0, h if heads else 0, q_index // block, kv_index // block]
        return in_layout & (kv_index <= q_index + offset)

    return BlockMask.from_kv_blocks(
        *_compressed(layout & ~full),
        *_compressed(full),
        BLOCK_SIZE=block,
        mask_mod=kept,
        seq_lengths=(grid.q_tokens, grid.kv_tokens),
    )


def _compressed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks in each row, and their indices in front of all others: int32, as BlockMask wants them."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, grid: Grid, scaling: float | None) -> Tensor:
    if q.is_cuda and grid.block % 64:
        raise AttentionError(f"expected blocks of a multiple of 64 tokens on a GPU (128 is best), got {grid.block}")
    if layout.shape[1] != 1:
        layout = layout.repeat_interleave(q.shape[1] // layout.shape[1], 1)
    # A tile of the kernel must lie in one block.
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if q.is_cuda and grid.block % 128 else None
    mask = block_mask(layout, grid)
    gqa = q.shape[1] != k.shape[1]
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scaling, enable_gqa=gqa, kernel_options=options)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _gather(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, grid: Grid, scaling: float | None) -> Tensor:
    """Block of queries by block of queries; the heads that keep equally many blocks in one call."""
    batch, q_heads, _, _ = q.shape
    heads = k.shape[1] if layout.shape[1] in (1, k.shape[1]) else q_heads
    shared = layout.shape[:2] == (1, 1)
    out = q.new_zeros(batch * heads, q_heads // heads, grid.q_tokens, v.shape[3])
    # A unit is what shares keys and a layout: [units, queries per unit, Lq, D] against [units or KV heads, Lk, D].
    q = q.reshape(batch * heads, -1, *q.shape[2:])
    kv_head = torch.arange(batch * heads, device=q.device) // (heads // k.shape[1])
    k, v = (_whole_blocks(x.flatten(0, 1), grid) for x in (k, v))
    rows = layout[0] if shared else layout.expand(batch, heads, -1, -1).flatten(0, 1)
    everyone = torch.arange(batch * heads, device=q.device)
    for i in range(grid.q_blocks):
        tokens = slice(i * grid.block, (i + 1) * grid.block)
        for members, blocks in _by_count(rows[:, i]):
            units = everyone if shared else members
            one = bool((blocks == blocks[0]).all())
            blocks = blocks[:1] if one else blocks
            keys, values = (_selected(x, kv_head[units], blocks, grid.block) for x in (k, v))
            found = functional.scaled_dot_product_attention(
                _units(q, units)[:, :, tokens],
                keys[:, None],
                values[:, None],
                attn_mask=_mask(grid, i, blocks),
                scale=scaling,
                enable_gqa=q.shape[1] != 1,
            )
            out[units, :, tokens] = found
    return out.view(batch, q_heads, grid.q_tokens, -1)


def _by_count(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[units, kv blocks]`` by the number of blocks they keep: indices, and the blocks ``[members, count]``."""
    counts = rows.sum(-1)
    for count in counts.unique().tolist():
        if count:
            members = (counts == count).nonzero().flatten()
            yield members, rows[members].nonzero()[:, 1].view(-1, count)


def _whole_blocks(tokens: Tensor, grid: Grid) -> Tensor:
    """``[heads, Lk, D]`` with zeros after it up to a whole number of blocks: the mask hides them."""
    missing = grid.kv_blocks * grid.block - grid.kv_tokens
    return functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def _units(x: Tensor, units: Tensor) -> Tensor:
    """The rows of some units: all of them without a copy."""
    return x if len(units) == len(x) else x[units]


def _selected(tokens: Tensor, heads: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The tokens of some blocks side by side, ``[units, count * block, D]``: without a copy where they do."""
    count = blocks.shape[1]
    first = int(blocks[0, 0])
    if len(blocks) == 1 and int(blocks[0, -1]) - first + 1 == count:
        tokens = tokens[:, first * block : (first + count) * block]
        return tokens if torch.equal(heads, torch.arange(len(tokens), device=heads.device)) else tokens[heads]
    return tokens.unflatten(1, (-1, block))[heads[:, None], blocks].flatten(1, 2)


def _mask(grid: Grid, i: int, blocks: Tensor) -> Tensor | None:
    """Which of the selected keys each query of block i sees, bool ``[units or 1, 1, queries, keys]``; None: all."""
    full = grid.full(blocks.device)[i]
    if grid.kv_tokens % grid.block:
        full[-1] = False  # the zeros after the last key
    partial = ~full[blocks]
    if not bool(partial.any()):
        return None
    if bool((partial == partial[0]).all()) and bool((blocks == blocks[0])[partial].all()):
        blocks = blocks[:1]  # units differ in blocks that are seen whole
    keys = (blocks[..., None] * grid.block + torch.arange(grid.block, device=blocks.device)).flatten(1)
    queries = torch.arange(i * grid.block, min((i + 1) * grid.block, grid.q_tokens), device=blocks.device)
    limit = queries + grid.offset if grid.causal else torch.full_like(queries, grid.kv_tokens - 1)
    return keys[:, None, None, :] <= limit[:, None]


def _checked(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, grid: Grid) -> Tensor:
    """The layout on the device of ``q``. Raises AttentionError for shapes that do not fit."""
    shapes.check(q, k, v)
    if (q.shape[2], k.shape[2]) != (grid.q_tokens, grid.kv_tokens):
        raise AttentionError(
            f"expected {grid.q_tokens} queries and {grid.kv_tokens} keys, as in the grid, got "
            f"{q.shape[2]} and {k.shape[2]}"
        )
    grid.check(layout)
    if layout.shape[0] not in (1, q.shape[0]) or layout.shape[1] not in (1, k.shape[1], q.shape[1]):
        raise AttentionError(
            f"layout: expected 1 or {q.shape[0]} rows and 1, {k.shape[1]} or {q.shape[1]} heads, "
            f"got {tuple(layout.shape[:2])}"
        )
    return layout.to(q.device) & grid.visible(q.device)
