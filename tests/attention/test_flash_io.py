"""The loops move what the I/O model says that they move, word for word."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bitforbit.attention import flash, patterns  # noqa: E402
from bitforbit.attention.grid import Grid  # noqa: E402
from bitforbit.attention.tiles import Access, Order, Tiles  # noqa: E402
from bitforbit.iomodel.algorithms import flash as model  # noqa: E402
from bitforbit.iomodel.memory import TwoLevelMemory  # noqa: E402
from bitforbit.iomodel.tiles import Tiles as ModelTiles  # noqa: E402

SIZES = [(1, 4, 1, 1), (64, 8, 8, 16), (65, 8, 8, 16), (50, 3, 64, 7), (37, 16, 5, 64), (40, 8, 10, 1)]
"""N, d, rows of Q, rows of K and V."""


@pytest.mark.parametrize("order", ["kv", "q"])
@pytest.mark.parametrize(("n", "d", "rows", "columns"), SIZES)
def test_words_read_and_written(n: int, d: int, rows: int, columns: int, order: Order) -> None:
    q, k, v = torch.randn(3, 1, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    record: list[list[Access]] = []
    out, _ = flash.attention(q[None], k[None], v[None], Tiles(rows, columns), order=order, record=record)
    read, written = (
        sum(access.words for access in record[0] if access.kind == kind and access.name != "L")
        for kind in ("read", "write")
    )
    inputs = {name: x[0].numpy() for name, x in zip("QKV", (q, k, v), strict=True)}
    memory = TwoLevelMemory(1 << 20, inputs)
    run = model.run_keys_outside if order == "kv" else model.run_queries_outside
    run(memory, n, d, ModelTiles(min(rows, n), min(columns, n), min(rows, n), d))
    assert (read, written) == (memory.loads, memory.stores)
    np.testing.assert_allclose(memory.slow["O"], out[0, 0].numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
def test_block_sparse_words_follow_the_blocks_kept(density: float) -> None:
    """2205.14135, proposition 4: N d, and a term in proportion to the blocks; here exactly."""
    n, d, block = 128, 8, 8
    grid = Grid(n, n, block)
    layout = patterns.with_density("local_global", grid, density)
    q, k, v = torch.randn(3, 1, n, d, generator=torch.Generator().manual_seed(0))
    record: list[list[Access]] = []
    flash.attention(q[None], k[None], v[None], Tiles(block, block), causal=True, layout=layout, record=record)
    assert sum(access.words for access in record[0]) == 2 * n * d + n + int(layout.sum()) * 2 * block * d
