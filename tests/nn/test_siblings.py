"""Linears that share their input, on CPU tensors through the emulation: one launch, the bits of single products."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bitforbit
from bitforbit import nn as bnn
from bitforbit.nn import siblings
from bitforbit.ops import gpu, stats
from bitforbit.ops.gpu import Policy
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue
from torch_helpers import assert_same_bits, gaussian

COLS = 320


class Attention(nn.Module):
    """q, k and v, then what mixes them."""

    def __init__(self, rows: tuple[int, int, int] = (128, 48, 80), bias: bool = False) -> None:
        super().__init__()
        for name, count in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
            self.add_module(name, nn.Linear(COLS, count, bias=bias))
        self.o_proj = nn.Linear(sum(rows), COLS, bias=False)
        self.skip: set[str] = set()

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        other = x if other is None else other
        parts = [
            getattr(self, name)(x if name == "q_proj" else other)
            for name in ("q_proj", "k_proj", "v_proj")
            if name not in self.skip
        ]
        return torch.cat(parts, -1)


@pytest.fixture
def emulated() -> Iterator[EmulatedLauncher]:
    launcher = EmulatedLauncher(3)
    with gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
        gpu.clear()


@pytest.fixture
def model(emulated: EmulatedLauncher) -> Attention:
    torch.manual_seed(0)
    made = Attention(bias=True).bfloat16().requires_grad_(False)
    bitforbit.compress_model(made, mode="fused")
    return bnn.set_layout(made, "tiles")


def products(launcher: EmulatedLauncher) -> int:
    """Launches of fused products since the last time."""
    count = sum(kernel == "fused_linear" for kernel, _ in launcher.launches)
    launcher.launches.clear()
    return count


def alone(model: Attention, x: torch.Tensor) -> torch.Tensor:
    with gpu.use_policy(Policy(grouped=False)):
        return model(x)


def test_together_after_the_first_pass(model, emulated):
    x = gaussian((2, 3, COLS))
    expected = alone(model, x)
    assert products(emulated) == 3
    for launches in (3, 1, 1):
        x = x.clone()
        stats.reset()
        assert_same_bits(model(x), expected)
        assert products(emulated) == launches
        assert stats.snapshot()["fused"].linears == 3
    plain = bitforbit.decompress_model(copy.deepcopy(model))
    torch.testing.assert_close(expected, plain(x), atol=0.02, rtol=0.02)
