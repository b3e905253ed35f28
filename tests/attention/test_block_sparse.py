"""Block-sparse attention against softmax(Q K^T) V with the layout as a mask of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from bitforbit.attention import block_sparse, flash, naive, patterns  # noqa: E402
from bitforbit.attention.grid import Grid  # noqa: E402
from bitforbit.attention.tiles import Tiles, layout_mask  # noqa: E402
from bitforbit.errors import AttentionError  # noqa: E402

GRIDS = [
    Grid(64, 64, 16), Grid(65, 65, 16), Grid(50, 77, 16), Grid(5, 40, 16), Grid(1, 63, 16),
    Grid(64, 64, 16, causal=False), Grid(70, 70, 16, causal=False), Grid(33, 100, 16, causal=False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The sizes are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(grid: Grid, dtype: torch.dtype = torch.float32, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, grid.q_tokens, dim), (2, 2, grid.kv_tokens, dim), (2, 2, grid.kv_tokens, dim))
    return [torch.randn(*size, generator=generator).to(dtype) for size in sizes]


def layouts(grid: Grid, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    blocks = (grid.q_blocks, grid.kv_blocks)
    found = {name: patterns.with_density(name, grid, 0.5, q, k) for name in patterns.PATTERNS}
    for rows, heads in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (2, 4)):  # own blocks and whole rows missing
        found[f"any {rows} {heads}"] = torch.rand(rows, heads, *blocks, generator=generator) < 0.5
    found["nothing"] = torch.zeros(1, 1, *blocks, dtype=torch.bool)
    return found


def as_mask(layout: torch.Tensor, grid: Grid, heads: int = 4) -> torch.Tensor:
    if layout.shape[1] != 1:
        layout = layout.repeat_interleave(heads // layout.shape[1], 1)
    return layout_mask(layout, Tiles(grid.block, grid.block), grid.q_tokens, grid.kv_tokens)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs(grid: Grid) -> None:
    q, k, v = tensors(grid)
    for name, layout in layouts(grid, q, k).items():
        expected, _ = naive.attention(q, k, v, causal=grid.causal, mask=as_mask(layout, grid), scaling=0.3)
        for backend in (None, "gather"):
            out = block_sparse.attention(q, k, v, layout, grid, scaling=0.3, backend=backend)
            assert float((out - expected).abs().max()) < 3e-6, name


def test_the_plain_version_agrees() -> None:
    grid = Grid(50, 77, 16)
    q, k, v = tensors(grid)
    layout = layouts(grid, q, k)["any 2 4"]
    for order in ("kv", "q"):
        expected, _ = flash.attention(q, k, v, Tiles(16, 16), order=order, causal=True, layout=layout)
        torch.testing.assert_close(block_sparse.attention(q, k, v, layout, grid), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_that_of_sdpa(dtype: torch.dtype) -> None:
    grid = Grid(200, 200, 32)
    q, k, v = tensors(grid, dtype, dim=64)
    for name, layout in layouts(grid, q, k).items():
        mask = as_mask(layout, grid) & torch.ones(200, 200, dtype=torch.bool).tril()
        exact, _ = naive.attention(q, k, v, mask=mask)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = block_sparse.attention(q, k, v, layout, grid, backend="gather")
        assert out.dtype == dtype
        assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7, name


def test_a_layout_that_leaves_nothing_out_is_sdpa_bit_for_bit() -> None:
    for grid in (Grid(100, 100, 16), Grid(100, 100, 16, causal=False)):
        q, k, v = tensors(grid, torch.bfloat16)
        k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k_all, v_all, is_causal=grid.causal)
        assert torch.equal(block_sparse.attention(q, k, v, patterns.dense(grid), grid), expected)


def test_a_row_is_what_it_is_alone() -> None:
    grid = Grid(80, 100, 16)
    q, k, v = tensors(grid, torch.bfloat16)
    for layout in layouts(grid, q, k).values():
        both = block_sparse.attention(q, k, v, layout, grid)
        for row in range(2):
            one = slice(row, row + 1)
            own = layout[one] if layout.shape[0] == 2 else layout
            assert torch.equal(block_sparse.attention(q[one], k[one], v[one], own, grid), both[one])


def test_views_are_taken_as_they_are() -> None:
    """Projections give [B, L, H, D]; a static cache more tokens than are used."""
    grid = Grid(65, 65, 16)
    q, k, v = tensors(grid)
    layout = patterns.with_density("topk", grid, 0.5, q, k)
    expected = block_sparse.attention(q, k, v, layout, grid)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (torch.cat([x, x], 2)[:, :, :65] for x in (k, v))
    assert torch.equal(block_sparse.attention(q, k, v, layout, grid), expected)


def test_gradients() -> None:
    grid = Grid(40, 55, 16)
    ours, theirs = ([x.requires_grad_() for x in tensors(grid)] for _ in range(2))
    layout = layouts(grid, ours[0].detach(), ours[1].detach())["any 2 4"]
    out = block_sparse.attention(*ours, layout, grid)
    expected, _ = naive.attention(*theirs, causal=True, mask=as_mask(layout, grid))
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(direction)
    expected.backward(direction.double())
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_block_masks(grid: Grid) -> None:
    """The blocks are the layout's; the function is exact for tokens; what is marked full is full."""
    q, k, _ = tensors(grid)
    seen = naive.visible(grid.q_tokens, grid.kv_tokens, grid.causal)
    queries, keys = torch.arange(grid.q_tokens)[:, None], torch.arange(grid.kv_tokens)[None]
    for name, layout in layouts(grid, q, k).items():
        if layout.shape[1] == 2:
            layout = layout.repeat_interleave(2, 1)
        mask = block_sparse.block_mask(layout, grid)
        assert mask.seq_lengths == (grid.q_tokens, grid.kv_tokens)
        assert torch.equal(mask.to_dense().bool(), layout & grid.visible()), name
        expected = (as_mask(layout, grid) & seen).expand(2, 4, -1, -1)
        for b in range(2):
            for h in range(4):
                got = mask.mask_mod(torch.tensor(b), torch.tensor(h), queries, keys)
                assert torch.equal(got, expected[b, h]), name
        full = mask.full_kv_num_blocks.sum()
        assert full == (layout & grid.full()).sum()
        assert not (layout & grid.full() & ~grid.visible()).any()


def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, without the compiler: the call, and the mask function. tests/gpu has the rest."""
    monkeypatch.setattr(block_sparse, "_compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention)
    grid = Grid(50, 77, 16)
    q, k, v = tensors(grid)
    for name in ("topk", "local_global", "any 2 4"):
        layout = layouts(grid, q, k)[name]
        out = block_sparse.attention(q, k, v, layout, grid, backend="flex", scaling=0.3)
        expected = block_sparse.attention(q, k, v, layout, grid, backend="gather", scaling=0.3)
        torch.testing.assert_close(out, expected)


def test_refusals() -> None:
    grid = Grid(32, 32, 16)
    q, k, v = tensors(grid)
    layout = patterns.dense(grid)
    with pytest.raises(AttentionError, match="Hq a multiple of Hkv"):
        block_sparse.attention(q[:, :3], k, v, layout, grid)
    with pytest.raises(AttentionError, match="expected 32 queries and 32 keys, as in the grid, got 32 and 16"):
        block_sparse.attention(q, k[:, :, :16], v[:, :, :16], layout, grid)
    with pytest.raises(AttentionError, match="layout: expected 1 or 2 rows and 1, 2 or 4 heads, got \\(1, 3\\)"):
        block_sparse.attention(q, k, v, layout.expand(1, 3, -1, -1), grid)
    with pytest.raises(AttentionError, match="expected 'gather', 'flex' or None, got 'triton'"):
        block_sparse.attention(q, k, v, layout, grid, backend="triton")
