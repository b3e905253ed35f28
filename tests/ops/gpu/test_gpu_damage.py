"""Damaged parts of the right lengths: an error or wrong weights, never a crash; and threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional

from bitforbit import ops
from bitforbit.errors import CorruptTensorError
from helpers.gpu_weights import LAYOUTS
from torch_helpers import assert_same_bits, gaussian

pytestmark = pytest.mark.usefixtures("emulated")


def damaged(part: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(
        torch.rand(part.shape, generator=generator) < 0.2,
        torch.randint(0, 256, part.shape, generator=generator, dtype=torch.uint8),
        part,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_damage_is_an_error_or_other_weights(layout, which):
    case = LAYOUTS[layout](gaussian((64, 200)))
    parts, errors = case.parts, 0
    for seed in range(4):
        case.parts = (*parts[:which], damaged(parts[which], seed), *parts[which + 1 :])
        try:
            assert case.linear(gaussian((2, 200))).shape == (2, 64)
        except CorruptTensorError:
            errors += 1
    if (layout, which) in {("planes", 0), ("df11", 3)}:
        assert errors == 4
    case.parts = parts
    x = gaussian((2, 200), seed=1)
    assert_same_bits(case.linear(x), functional.linear(x, case.weight))  # the error is not said again


def test_threads():
    """Each thread has a schedule of its own; all learn the order together."""
    cases = [LAYOUTS["tiles"](gaussian((128, 128), seed=seed)) for seed in range(3)]
    inputs = [gaussian((2, 128), seed=10 + i) for i in range(4)]

    def plain(x: torch.Tensor) -> torch.Tensor:
        for case in cases:
            x = functional.linear(x, case.weight)
        return x

    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for _ in range(5):
            x = inputs[i]
            for case in cases:
                x = case.linear(x)
            results[i].append(x)
        ops.gpu.clear()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, got in zip(inputs, results, strict=True):
        assert len(got) == 5
        for y in got:
            assert_same_bits(y, plain(x))
