"""The reference's sums: close to FP64, in the order that they say, and whole with NaN and infinity."""

from __future__ import annotations

import numpy as np
import pytest
from fused_cases import activations, bf16, floats

from bitforbit.cuda.fused import reference
from bitforbit.cuda.fused.order import Order
from helpers.tile_cases import gaussian


@pytest.mark.parametrize(("rows", "cols", "tokens", "splits"), [(16, 64, 1, 1), (40, 72, 3, 2), (33, 1000, 9, 3)])
def test_close_to_fp64(rows: int, cols: int, tokens: int, splits: int) -> None:
    weights, x = gaussian(rows, cols, 1), activations(tokens, cols)
    bias = bf16(np.random.default_rng(1).standard_normal(rows))
    got = floats(reference.linear(x, weights, Order(cols, splits), bias))
    exact = floats(x) @ floats(weights).T + floats(bias)
    size = np.abs(floats(x)) @ np.abs(floats(weights)).T + np.abs(floats(bias))
    assert (np.abs(got - exact) <= np.abs(exact) * 2**-8 + size * 2**-20).all()


def test_the_order_is_what_it_says() -> None:
    """Large + 1 - large loses the 1, in one accumulator and in one split each; large - large + 1 does not."""
    weights = np.zeros((1, 192), np.uint16)
    weights[0, [0, 64, 128]] = bf16([2.0**30, 1, -(2.0**30)])
    ones = bf16(np.ones((1, 192)))
    assert reference.linear(ones, weights, Order(192, 1)) == 0
    assert reference.linear(ones, weights, Order(192, 3)) == 0
    weights[0, [64, 128]] = weights[0, [128, 64]]
    assert floats(reference.linear(ones, weights, Order(192, 3))) == 1
    # One instruction adds its products up exactly.
    weights[0, [0, 1, 2]] = bf16([2.0**30, 1, -(2.0**30)])
    weights[0, 3:] = 0
    assert floats(reference.linear(ones, weights, Order(192, 1))) == 1


def test_rounding_to_bf16() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -np.inf, np.nan, 3.4e38, -0.0], np.float32)
    assert reference.to_bf16(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xFF80, 0x7FFF, 0x7F80, 0x8000]


def test_tokens_do_not_know_of_each_other() -> None:
    weights, x = gaussian(20, 300, 2), activations(7, 300)
    x[3, 5] = 0x7FC0
    whole = reference.linear(x, weights, Order(300, 2))
    for token in range(7):
        np.testing.assert_array_equal(reference.linear(x[token : token + 1], weights, Order(300, 2))[0], whole[token])
    assert (whole[3] == 0x7FFF).all()
