from __future__ import annotations

import pytest
import torch

from bitforbit import ops
from bitforbit.cpu.linear import LANES, Order
from bitforbit.errors import OrderMismatchError
from bitforbit.ops import proven, stats
from torch_helpers import assert_same_bits, encode, gaussian

ROWS, COLS = 48, 96


@pytest.fixture
def asked(monkeypatch) -> list[tuple[object, ...]]:
    """A prover that names the order of fused mode, and what it was asked."""
    calls: list[tuple[object, ...]] = []

    def lookup(*key: object) -> Order:
        calls.append(key)
        return LANES

    monkeypatch.setattr(proven, "lookup", lookup)
    return calls


PROVABLE = [(COLS,), (1, COLS), (5, COLS), (2, 3, COLS), (2, 2, 2, COLS)]


@pytest.mark.parametrize("shape", PROVABLE, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_proven_products_are_used(asked, shape, with_bias):
    weight, bias = gaussian((ROWS, COLS)), gaussian((ROWS,)) if with_bias else None
    parts, how = encode(weight)
    x = gaussian(shape, seed=1)
    stats.reset()
    got = ops.linear(x, *parts, bias, *how, "exact")
    if with_bias and len(shape) not in (2, 3):
        assert not asked
        assert stats.snapshot()["decoded"].linears == 1
        return
    assert asked == [(ROWS, COLS, x.numel() // COLS, torch.get_num_threads(), with_bias, torch.bfloat16)]
    assert stats.snapshot()["fused_exact"] == stats.Count(1, ROWS * COLS * 2)
    assert_same_bits(got, ops.linear(x, *parts, bias, *how, "fused"))


def test_other_inputs_are_not_asked_about(asked):
    parts, how = encode(gaussian((ROWS, COLS)))
    for x in (
        gaussian((5, 2 * COLS))[:, :COLS],
        gaussian((5, 2, COLS)).transpose(0, 1),
        gaussian((COLS, 5)).t(),
        gaussian((0, COLS)),
    ):
        ops.linear(x, *parts, None, *how, "exact")
    for dtype in (torch.float32, torch.float16):
        others, other_how = encode(gaussian((ROWS, COLS), dtype))
        ops.linear(gaussian((5, COLS), dtype), *others, None, *other_how, "exact")
    ops.linear(gaussian((5, COLS)), *parts, None, *how, "fused")
    assert not asked


def test_unproven_products_are_decoded(monkeypatch):
    monkeypatch.setattr(proven, "lookup", lambda *key: None)
    weight, x = gaussian((ROWS, COLS)), gaussian((5, COLS), seed=1)
    parts, how = encode(weight)
    stats.reset()
    assert_same_bits(ops.linear(x, *parts, None, *how, "exact"), torch.nn.functional.linear(x, weight))
    assert stats.snapshot()["decoded"].linears == 1


def test_with_nan_the_decoded_product_decides(asked):
    weight, x = gaussian((ROWS, COLS)), gaussian((5, COLS), seed=1)
    weight[3, 4], x[2, 7] = float("nan"), float("inf")
    parts, how = encode(weight)
    stats.reset()
    assert_same_bits(ops.linear(x, *parts, None, *how, "exact"), torch.nn.functional.linear(x, weight))
    assert asked
    assert stats.snapshot()["decoded"].linears == 1


def test_a_wrong_proof_is_noticed(asked, monkeypatch):
    """The order of fused mode is not torch's: with cancelling sums the bits differ."""
    monkeypatch.setenv("BITFORBIT_PARANOID", "1.0")
    weight = gaussian((64, 512))
    weight[:, 256:] = -weight[:, :256]
    parts, how = encode(weight)
    half = gaussian((4, 256), seed=1)
    x = torch.cat((half, half), 1)
    with pytest.raises(OrderMismatchError, match="the proof is withdrawn"):
        ops.linear(x, *parts, None, *how, "exact")


@pytest.mark.parametrize("tokens", [1, 4])
def test_torch_is_matched_whatever_was_proven(tokens):
    weight, bias = gaussian((256, 512)), gaussian((256,), seed=3)
    parts, how = encode(weight)
    for b in (None, bias):
        for x in (gaussian((tokens, 512), seed=1), gaussian((1, tokens, 512), seed=2)):
            assert_same_bits(ops.linear(x, *parts, b, *how, "exact"), torch.nn.functional.linear(x, weight, b))


def test_threads_that_flush_denormals():
    """Torch's kernels then take a denormal bias for zero, in the one thread that asked for it."""
    weight, x = gaussian((256, 512)) * 1e-20, gaussian((4, 512), seed=1) * 1e-20
    bias = gaussian((256,), seed=2) * 1e-37
    assert 0 < float(bias.abs().max()) < torch.finfo(torch.bfloat16).smallest_normal
    parts, how = encode(weight)
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            assert_same_bits(ops.linear(x, *parts, bias, *how, "exact"), torch.nn.functional.linear(x, weight, bias))
    finally:
        torch.set_flush_denormal(False)
