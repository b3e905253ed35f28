"""Block-sparse attention on a GPU: flex_attention, compiled, against softmax(Q K^T) V with the layout as its mask."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from bitforbit.attention import block_sparse, naive, patterns  # noqa: E402
from bitforbit.attention.grid import Grid  # noqa: E402
from bitforbit.attention.tiles import Tiles, layout_mask  # noqa: E402
from bitforbit.errors import AttentionError  # noqa: E402


def tensors(grid: Grid, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((8, grid.q_tokens), (2, grid.kv_tokens), (2, grid.kv_tokens))
    made = (torch.randn(batch, *size, 64, generator=generator, device="cuda") for size in sizes)
    return [x.to(torch.bfloat16) for x in made]


def check(grid: Grid, pattern: str, batch: int = 1) -> None:
    q, k, v = tensors(grid, batch)
    layout = patterns.with_density(pattern, grid, 0.5, q, k)
    per_head = layout if layout.shape[1] == 1 else layout.repeat_interleave(4, 1)
    mask = layout_mask(per_head, Tiles(grid.block, grid.block), grid.q_tokens, grid.kv_tokens)
    mask = mask & naive.visible(grid.q_tokens, grid.kv_tokens, True, device=q.device)
    exact, _ = naive.attention(q, k, v, mask=mask)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for backend in ("flex", "gather"):
        out = block_sparse.attention(q, k, v, layout, grid, backend=backend)
        assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max(), backend


@pytest.mark.parametrize("block", [64, 128])
def test_patterns(block: int) -> None:
    for pattern in ("local_global", "topk"):
        check(Grid(1024, 1024, block), pattern)


def test_other_sizes() -> None:
    """Further lengths come from code for any length, compiled once."""
    for q_tokens, kv_tokens in ((1024, 1024), (700, 700), (300, 777), (901, 1300)):
        check(Grid(q_tokens, kv_tokens, 128), "topk")
    check(Grid(500, 500, 128), "topk", batch=2)


def test_gradients() -> None:
    grid = Grid(512, 512, 128)
    q, k, v = (x.requires_grad_() for x in tensors(grid))
    layout = patterns.with_density("local_global", grid, 0.5, q, k)
    direction = torch.randn(q.shape, device="cuda", dtype=q.dtype)
    found = {}
    for backend in ("flex", "gather"):
        out = block_sparse.attention(q, k, v, layout, grid, backend=backend)
        found[backend] = torch.autograd.grad(out, (q, k, v), direction)
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()


def test_blocks_that_no_tile_divides() -> None:
    grid = Grid(96, 96, 32)
    q, k, v = tensors(grid)
    layout = patterns.local(grid, 1)
    with pytest.raises(AttentionError, match="a multiple of 64 tokens on a GPU"):
        block_sparse.attention(q, k, v, layout, grid)
