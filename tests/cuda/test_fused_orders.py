"""Other orders of summation than the device's own: the kernels follow them, and they are others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from fused_cases import DeviceGroup, activations, bf16, plain

from bitforbit.cuda.fused import linear, reference
from bitforbit.cuda.fused import plan as plans
from bitforbit.cuda.fused.order import PARTIALS, REDUCTIONS, Order
from bitforbit.cuda.kernel import DeviceProperties
from bitforbit.errors import UsageError
from bitforbit.ops import probe
from cuda_shim.emulation import EmulatedQueue, run_everywhere
from helpers.tile_cases import Words, gaussian

COLS = 440  # seven tiles
ORDERS = (
    Order(COLS, 1, instruction="mma.m16n8k8"),
    Order(COLS, 1, bias_rounded=True),
    Order(COLS, 3, 3),
    Order(COLS, 3, 2, longer=1),
    Order(COLS, 4, 2),
    *(Order(COLS, 5, reduction=reduction) for reduction in REDUCTIONS),
    *(Order(COLS, 7, partials=partials) for partials in PARTIALS),
    *(Order(COLS, 6, reduction=reduction, partials="running BF16") for reduction in REDUCTIONS[1:]),
    Order(COLS, 5, reduction="halves", partials="BF16", bias_rounded=True, instruction="mma.m16n8k8"),
)
names = pytest.mark.parametrize("order", ORDERS, ids=lambda o: f"{o.splits}-{o.split_tiles}-{o.rules:b}")


def operands(rows: int = 20, tokens: int = 3) -> tuple[Words, Words, Words]:
    """Weights, activations, bias: sums of mixed sizes and signs, in which every rounding shows."""
    random = np.random.default_rng(1)
    weights = bf16(random.standard_normal((rows, COLS)) * np.exp2(random.integers(-6, 7, (rows, COLS))))
    return weights, activations(tokens, COLS), bf16(random.standard_normal(rows) * 50)


@names
def test_kernels_follow_the_order(queue: Any, order: Order) -> None:
    weights, x, bias = operands()
    device = DeviceGroup(queue, [weights], [bias])
    device.use(order)
    (got,) = device.linear(x)
    if order.k_step == 16 and queue.properties.compute_capability == (9, 0):
        device.use(replace(order, instruction="wgmma.m64nNk16"))
        (by_warpgroups,) = device.linear(x)
        if isinstance(queue, EmulatedQueue):  # where both instructions sum alike
            np.testing.assert_array_equal(by_warpgroups, got)
    unfused = plain(queue, weights, x, order, bias)
    np.testing.assert_array_equal(got, unfused)
    if isinstance(queue, EmulatedQueue):
        np.testing.assert_array_equal(unfused, reference.linear(x, weights, order, bias))


def test_orders_are_others() -> None:
    """No two of them give the same bits where all products cancel: a probe can tell them apart."""
    inputs = probe.cancelling(np.random.default_rng(0), 20, COLS, 3, False)
    weights, x = (t.view(torch.int16).numpy().view(np.uint16) for t in (inputs.weight, inputs.x))
    orders = {replace(order, bias_rounded=False) for order in (Order(COLS, 1), *ORDERS)}
    assert len(orders) == len(ORDERS)
    assert len({reference.linear(x, weights, order).tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize(
    "order", [replace(ORDERS[-1], instruction="mma.m16n8k16"), Order(COLS, 7, reduction="neighbours", partials="BF16")]
)
def test_memory_and_races(order: Order) -> None:
    weights, x, bias = operands(145, 9)

    def run(queue: Any) -> list[Words]:
        device = DeviceGroup(queue, [weights, weights[:20]], [bias, None])
        device.use(order)
        return device.linear(x)

    whole, part = run_everywhere(run)
    np.testing.assert_array_equal(whole, reference.linear(x, weights, order, bias))
    np.testing.assert_array_equal(part, reference.linear(x, weights[:20], order))


@names
def test_ranges_cover_the_columns(order: Order) -> None:
    ranges = order.ranges
    assert (len(ranges), ranges[0][0], ranges[-1][1]) == (order.splits, 0, 448)
    assert all(begin < end and begin % 64 == 0 for begin, end in ranges)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize(
    "wrong",
    [
        {"split_tiles": 1}, {"split_tiles": 7}, {"split_tiles": 4}, {"split_tiles": -3}, {"longer": 1},
        {"split_tiles": 2, "longer": 3}, {"split_tiles": 3, "longer": -1}, {"reduction": "sideways"},
        {"partials": "F16"}, {"instruction": "abacus"},
    ],
)  # fmt: skip
def test_orders_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Order(COLS, 3, **wrong)


def test_trees_have_a_limit() -> None:
    Order(64 * 32, 32, reduction="halves")
    Order(64 * 33, 33, reduction="descending")
    with pytest.raises(UsageError, match="at most 32 splits"):
        Order(64 * 33, 33, reduction="halves")


def test_a_launch_has_the_instruction_of_its_order() -> None:
    h200 = DeviceProperties("H200", (9, 0), 132, 50 << 20, 227 << 10)
    half = Order(COLS, 2, instruction="mma.m16n8k8")
    for tokens in (1, 9, 33, 64):
        launch = plans.plan((64,), half, tokens, h200)
        assert launch.variant in plans.HALF_STEPS
        assert vars(launch.variant) == vars(plans.choose_variant(tokens, h200))
        hopper = plans.plan((64,), replace(half, instruction="wgmma.m64nNk16"), tokens, h200)
        assert hopper.variant in plans.HOPPER
    a100 = DeviceProperties("A100", (8, 0), 108, 40 << 20, 163 << 10)
    assert plans.instructions(a100) == ("mma.m16n8k16", "mma.m16n8k8")
    assert plans.instructions(h200) == (*plans.instructions(a100), "wgmma.m64nNk16")
    with pytest.raises(UsageError, match="expected an instruction of A100 for BF16, got wgmma"):
        plans.choose_variant(1, a100, "wgmma.m64nNk16")


def test_an_order_of_other_columns_is_refused() -> None:
    queue = EmulatedQueue()
    device = DeviceGroup(queue, [gaussian(20, COLS)])
    with pytest.raises(UsageError, match="expected an order of 440 columns"):
        linear.linear(queue, device.group, 256, 1, 256, 256, None, Order(64, 1))
    assert not queue.launcher.launches
