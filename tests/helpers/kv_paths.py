"""Fixtures of tests of caches: one thread, since tensors are small, and three ways of packing and attending."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitforbit import ops
from bitforbit.kv import kernels
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "cpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What packs and attends."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "can_flush", lambda *_: False)
        monkeypatch.setattr(kernels, "can_attend", lambda *_: False)
    return str(request.param)


@pytest.fixture
def emulated() -> Iterator[EmulatedLauncher]:
    """CUDA's kernels, in the emulation."""
    launcher = EmulatedLauncher(seed=1)
    with ops.gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
