"""Layouts: what each pattern keeps, at all sizes, and the share that is asked for."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from bitforbit.attention import patterns  # noqa: E402
from bitforbit.attention.grid import Grid  # noqa: E402
from bitforbit.errors import AttentionError  # noqa: E402

GRIDS = [
    Grid(q, kv, block, causal)
    for q, kv, block, causal in (
        (64, 64, 8, True), (63, 63, 8, True), (65, 65, 8, True), (1, 1, 8, True), (1, 100, 8, True),
        (30, 101, 8, True), (64, 128, 16, True), (64, 64, 8, False), (65, 30, 8, False), (30, 101, 16, False),
    )
]  # fmt: skip


def qk(grid: Grid, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, grid.q_tokens, 16, generator=generator)
    return q, torch.randn(2, 2, grid.kv_tokens, 16, generator=generator)


def rows(layout: torch.Tensor) -> list[str]:
    return ["".join(".x"[int(kept)] for kept in row) for row in layout[0, 0]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_is_what_its_tokens_say(grid: Grid) -> None:
    token_seen = torch.ones(grid.q_tokens, grid.kv_tokens, dtype=torch.bool)
    if grid.causal:
        token_seen = token_seen.tril(grid.offset)
    for i, j in itertools.product(range(grid.q_blocks), range(grid.kv_blocks)):
        queries, keys = (slice(n * grid.block, (n + 1) * grid.block) for n in (i, j))
        part = token_seen[queries, keys]
        assert bool(grid.visible()[i, j]) == bool(part.any())
        assert bool(grid.full()[i, j]) == bool(part.all())
        positions = torch.arange(grid.q_tokens)[queries] + grid.offset
        assert bool(grid.own()[i, j]) == bool((positions // grid.block == j).any())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_every_pattern_at_every_size(name: str, grid: Grid) -> None:
    densities = []
    for density in (0.01, 0.25, 0.5, 1):
        layout = patterns.with_density(name, grid, density, *qk(grid))
        grid.check(layout)
        assert not (layout & ~grid.visible()).any()
        assert (layout | ~(grid.own() & grid.visible())).all()
        densities.append(grid.density(layout))
    assert densities == sorted(densities)
    assert densities[-1] == 1


@pytest.mark.parametrize("name", [name for name in patterns.PATTERNS if name != "dense"])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_the_share_that_is_asked_for(name: str, density: float) -> None:
    grid = Grid(64 * 16, 64 * 16, 16)
    found = grid.density(patterns.with_density(name, grid, density, *qk(grid)))
    if name in ("topk", "random"):
        assert density <= found <= density + 1.5 / 64  # rounded up in each row
    else:
        least = 0.6 if name == "strided" else 0.85  # its parameter takes large steps
        assert least * density <= found <= density


def test_pictures() -> None:
    grid = Grid(8, 8, 1)
    assert rows(patterns.local(grid, 2)) == [
        "x.......", "xx......", ".xx.....", "..xx....", "...xx...", "....xx..", ".....xx.", "......xx",
    ]  # fmt: skip
    assert rows(patterns.local_global(grid, 2, 1))[4:] == ["x..xx...", "x...xx..", "x....xx.", "x.....xx"]
    assert rows(patterns.strided(grid, 3))[5:] == ["..xxxx..", "x..xxxx.", ".x..xxxx"]
    assert rows(patterns.strided(grid, 3, 1))[5:] == ["..x..x..", "x..x..x.", ".x..x..x"]
    assert rows(patterns.butterfly(grid, 8))[4:] == ["x...x...", ".x..xx..", "..x.x.x.", "...x.xxx"]
    assert rows(patterns.butterfly(grid, 2, global_blocks=1))[4:] == ["x...x...", "x...xx..", "x.....x.", "x.....xx"]
    both_ways = Grid(4, 4, 1, causal=False)
    assert rows(patterns.local(both_ways, 2)) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert rows(patterns.local_global(both_ways, 1, 1)) == ["xxxx", "xx..", "x.x.", "x..x"]
    assert rows(patterns.butterfly(both_ways, 4)) == ["xxx.", "xx.x", "x.xx", ".xxx"]


def test_queries_that_start_inside_a_block_keep_both_of_their_own() -> None:
    grid = Grid(q_tokens=8, kv_tokens=21, block=4)  # queries 13..16 and 17..20
    assert rows(patterns.local(grid, 1)) == ["...xx.", "....xx"]


def test_random_is_drawn_by_seed() -> None:
    grid = Grid(512, 512, 16)
    first = patterns.random(grid, 3, window=2, global_blocks=1, seed=1)
    assert torch.equal(first, patterns.random(grid, 3, window=2, global_blocks=1, seed=1))
    assert not torch.equal(first, patterns.random(grid, 3, window=2, global_blocks=1, seed=2))
    assert (first.sum(-1)[0, 0, 8:] == 6).all()


def test_top_blocks_are_those_that_are_looked_at() -> None:
    """Each KV head has a block of keys that the queries of its group point to."""
    grid = Grid(160, 160, 16)
    q, k = qk(grid)
    q, k = q * 0.01, k * 0.01
    direction = torch.ones(16)
    q[:, :, 128:] += direction  # the queries of blocks 8 and 9
    k[0, 0, 3 * 16 : 4 * 16] += direction
    k[0, 1, 5 * 16 : 6 * 16] += direction
    layout = patterns.topk(grid, q, k, 3)
    assert layout.shape == (2, 2, 10, 10)
    assert layout[0, 0, 8].nonzero().flatten().tolist() == [0, 3, 8]
    assert layout[0, 1, 9].nonzero().flatten().tolist() == [0, 5, 9]
    assert (layout[:, :, 2:].sum(-1) == 3).all()


def test_refusals() -> None:
    grid = Grid(32, 32, 8)
    with pytest.raises(AttentionError, match="window: expected at least 1, got 0"):
        patterns.local(grid, 0)
    with pytest.raises(AttentionError, match="global_blocks: expected at least 0, got -1"):
        patterns.local_global(grid, 1, -1)
    with pytest.raises(AttentionError, match="max_stride"):
        patterns.butterfly(grid, 0)
    with pytest.raises(AttentionError, match="count: expected at least 1"):
        patterns.topk(grid, *qk(grid), 0)
    with pytest.raises(AttentionError, match=r"expected one of dense, .*, got 'spiral'"):
        patterns.with_density("spiral", grid, 0.5)
    with pytest.raises(AttentionError, match="density"):
        patterns.with_density("local", grid, 0)
    with pytest.raises(AttentionError, match="expected q and k, got none"):
        patterns.with_density("topk", grid, 0.5)
    with pytest.raises(AttentionError, match="as many keys as queries"):
        Grid(10, 9)
    with pytest.raises(AttentionError, match="at least one query"):
        Grid(0, 9)
    with pytest.raises(AttentionError, match=r"layout: expected bool \[B, H, 4, 4\]"):
        grid.check(torch.ones(1, 1, 4, 5, dtype=torch.bool))
