"""Slices of rows are used where they keep torch's bits, and nowhere else."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.ops.gpu import Policy, slices
from helpers.gpu_weights import LAYOUTS
from torch_helpers import assert_same_bits, gaussian

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFORBIT_CACHE", str(tmp_path))
    slices.clear()
    yield
    slices.clear()


def in_order(x, weight, bias):
    """Sums in FP32, one column after the other, whatever the sizes."""
    total = torch.zeros(len(x), len(weight))
    for k in range(x.shape[1]):
        total += x[:, k, None].float() * weight[None, :, k].float()
    return (total if bias is None else total + bias.float()).to(x.dtype)


def backwards_if_few_rows(x, weight, bias):
    if len(weight) < 512:
        return in_order(x.flip(1), weight.flip(1), bias)
    return in_order(x, weight, bias)


def halves_if_few_rows(x, weight, bias):
    """Two accumulators: what split-K does."""
    if len(weight) >= 512:
        return in_order(x, weight, bias)
    half = x.shape[1] // 2
    total = sum(
        in_order(x[:, part].float(), weight[:, part].float(), None) for part in (slice(half), slice(half, None))
    )
    return (total if bias is None else total + bias.float()).to(x.dtype)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_probe(has_bias):
    arguments = (CPU, 600, 64, 3, 256, has_bias)
    assert slices.keeps_bits(in_order, *arguments)
    assert not slices.keeps_bits(backwards_if_few_rows, *arguments)
    assert not slices.keeps_bits(halves_if_few_rows, *arguments)


def test_inputs_that_tell_nothing_prove_nothing():
    assert not slices.keeps_bits(in_order, CPU, 600, 2, 3, 256, False)


def test_a_bias_rounded_apart_in_slices_is_found():
    def twice_rounded_if_few_rows(x, weight, bias):
        if len(weight) >= 512 or bias is None:
            return in_order(x, weight, bias)
        return in_order(x, weight, None) + bias

    assert not slices.keeps_bits(twice_rounded_if_few_rows, CPU, 600, 64, 3, 256, True)
    assert slices.keeps_bits(twice_rounded_if_few_rows, CPU, 600, 64, 3, 256, False)


def test_rows_of_slice():
    assert slices.rows_of_slice(1000, 100, 100_000) == 1000
    assert slices.rows_of_slice(1000, 100, 60_000) == 512
    assert slices.rows_of_slice(1000, 100, 10) == 256
    assert slices.rows_of_slice(100, 100, 10) == 100


@pytest.mark.parametrize(
    ("layout", "tokens", "with_bias"),
    [("tiles", 1, False), ("tiles", 64, True), ("tiles", 7, False), ("df11", 1, True), ("planes", 64, False)],
)
def test_sliced_or_not_the_bits_are_those_of_torch(emulated, layout, tokens, with_bias):
    case = LAYOUTS[layout](gaussian((600, 96)))
    bias = gaussian((600,), seed=3) if with_bias else None
    x = gaussian((tokens, 96), seed=4)
    with ops.gpu.use_policy(Policy(slice_bytes=60_000)):
        for shaped in (x, x.view(1, tokens, 96)) if with_bias else (x, x.view(1, 1, tokens, 96), x[0]):
            assert_same_bits(case.linear(shaped, bias), functional.linear(shaped, case.weight, bias))


def test_slices_are_used_where_proven(emulated, monkeypatch):
    case = LAYOUTS["tiles"](gaussian((600, 96)))
    x = gaussian((2, 96), seed=4)
    expected = functional.linear(x, case.weight)
    for proven in (False, True):
        slices.clear()
        monkeypatch.setattr(slices, "keeps_bits", lambda *_, proven=proven: proven)
        monkeypatch.setattr(slices, "store", lambda *_: None)
        monkeypatch.setattr(slices, "load", lambda *_: {})
        with ops.gpu.use_policy(Policy(slice_bytes=60_000)):
            for _ in range(2):
                emulated.launches.clear()
                got = case.linear(x)
                assert len(emulated.launches) == (3 if proven else 1)
        torch.testing.assert_close(got, expected)
    emulated.launches.clear()
    case.linear(x)
    assert len(emulated.launches) == 1  # the default policy


def test_verdicts_are_kept(monkeypatch):
    calls = []

    def keeps_bits(*arguments):
        calls.append(arguments)
        return True

    monkeypatch.setattr(slices, "keeps_bits", keeps_bits)
    x = gaussian((2, 96))
    assert not slices.allowed(x, None, 600, 256, may_probe=False)
    assert slices.allowed(x, None, 600, 256, may_probe=True)
    assert slices.allowed(x, None, 600, 256, may_probe=False)
    slices.clear()
    assert slices.allowed(x, None, 600, 256, may_probe=False)
    assert len(calls) == 1
    assert not slices.allowed(x, gaussian((600,)), 600, 256, may_probe=False)
    assert not slices.allowed(gaussian((3, 96)), None, 600, 256, may_probe=False)
    file = slices.path()
    content = json.loads(file.read_text())
    content["environment"]["torch"] = "0.1"
    file.write_text(json.dumps(content))
    slices.clear()
    assert not slices.allowed(x, None, 600, 256, may_probe=False)
    for damaged in ("{", "[]", '{"version": 1}'):
        file.write_text(damaged)
        assert slices.load(file) == {}


def test_what_was_not_probed_is_not_sliced():
    by_columns = gaussian((96, 5)).t()
    assert not slices.allowed(by_columns, None, 600, 256, may_probe=True)
    assert not slices.allowed(gaussian((5, 96)).float(), None, 600, 256, may_probe=True)
    assert not slices.allowed(gaussian((5, 96)), gaussian((600,)).float(), 600, 256, may_probe=True)
    assert not slices.allowed(gaussian((0, 96)), None, 600, 256, may_probe=True)


def test_too_little_memory_is_no_verdict(monkeypatch):
    def keeps_bits(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(slices, "keeps_bits", keeps_bits)
    assert not slices.allowed(gaussian((2, 96)), None, 600, 256, may_probe=True)
    monkeypatch.setattr(slices, "keeps_bits", lambda *_: True)
    assert slices.allowed(gaussian((2, 96)), None, 600, 256, may_probe=True)
