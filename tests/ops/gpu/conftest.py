from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitforbit import ops
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue


@pytest.fixture
def emulated() -> Iterator[EmulatedLauncher]:
    """Kernels on CPU tensors run in the emulation."""
    launcher = EmulatedLauncher(seed=1)
    with ops.gpu.emulate(EmulatedQueue(launcher)):
        yield launcher
    ops.gpu.clear()
