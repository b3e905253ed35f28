"""Order of summation, variants and launches: pure functions, and what must not depend on what."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import Order, choose_order
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import UsageError

H200 = DeviceProperties("H200", (9, 0), 132, 50 << 20, 227 << 10)
A100 = DeviceProperties("A100", (8, 0), 108, 40 << 20, 163 << 10)
RTX4090 = DeviceProperties("RTX 4090", (8, 9), 128, 72 << 20, 99 << 10)
SHAPES = [((4096,), 4096), ((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((4096,), 14336), ((128256,), 4096)]


@pytest.mark.parametrize(("cols", "splits"), [(1, 1), (64, 1), (65, 2), (4096, 7), (14336, 16), (1000, 3)])
def test_ranges_cover_the_columns_in_whole_tiles(cols: int, splits: int) -> None:
    ranges = Order(cols, splits).ranges
    assert (len(ranges), ranges[0][0], ranges[-1][1]) == (splits, 0, -(-cols // 64) * 64)
    assert all(begin < end and begin % 64 == 0 for begin, end in ranges)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize("splits", [0, -1, 3])
def test_orders_that_are_refused(splits: int) -> None:
    with pytest.raises(UsageError, match="1 to 2 splits of 128 columns, got"):
        Order(128, splits)


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda device: device.name)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_small_matrices_are_split_to_fill_the_device(
    rows: tuple[int, ...], cols: int, device: DeviceProperties
) -> None:
    order = choose_order(rows, cols, device)
    units = sum(-(-count // 128) for count in rows)
    assert order.splits == 1 or units * order.splits <= 5 * device.multiprocessors
    assert units * order.splits >= 0.7 * device.multiprocessors


def test_nothing_is_no_group() -> None:
    for rows, cols in [((), 64), ((0,), 64), ((16,), 0)]:
        with pytest.raises(UsageError, match="at least one row and column"):
            choose_order(rows, cols, H200)


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda device: device.name)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_every_device_has_a_variant_that_fits(tokens: int, device: DeviceProperties) -> None:
    variant = plans.choose_variant(tokens, device)
    assert variant.tokens >= tokens > variant.tokens // 2 * (variant.tokens > 8)
    assert variant.shared_bytes() <= device.shared_bytes_per_block
    resident = min(variant.blocks, device.shared_bytes_per_block // variant.shared_bytes())
    # Little's law: bytes that must be on their way for each multiprocessor of an H200 to keep its memory busy.
    assert resident * variant.warps * variant.stripes * variant.stages * 1408 >= 29_000 or device is RTX4090


def test_variants_that_are_refused() -> None:
    for tokens in (0, -1, 65):
        with pytest.raises(UsageError, match="1 to 64 tokens, got"):
            plans.choose_variant(tokens, H200)
    tiny = DeviceProperties("tiny", (8, 0), 1, 1 << 20, 48 << 10)
    with pytest.raises(UsageError, match="shared memory"):
        plans.choose_variant(8, tiny)
    with pytest.raises(UsageError, match="at most 8 tokens"):
        plans.plan((64,), Order(64, 1), 9, H200, plans.VARIANTS[0])


def test_a_launch() -> None:
    order = choose_order((4096,), 4096, H200)
    launches = [plans.plan((4096,), order, tokens, H200) for tokens in (1, 8, 64)]
    assert [launch.config.grid[0] for launch in launches] == [32 * order.splits] * 3
    assert launches[0] == launches[1]
    sums = [launch.workspace_bytes - plans.ARRIVED_BYTES for launch in launches]
    assert sums == [4 * order.splits * 4096 * room for room in (8, 8, 64)]
    assert plans.workspace_bytes((4096,), order, H200) == launches[2].workspace_bytes
    assert plans.plan((4096,), Order(4096, 1), 64, H200).workspace_bytes == plans.ARRIVED_BYTES


def test_launches_that_are_too_large() -> None:
    for rows, splits in [((1 << 21,) * 2, 2), ((1 << 31,) * 200, 1)]:
        with pytest.raises(UsageError, match="fewer matrices at once"):
            plans.plan(rows, Order(4096, splits), 8, H200)
