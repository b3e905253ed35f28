"""``queue``: what kernels run through, in the emulation with several orders of lanes and on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bitforbit.cuda import device
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue

GPUS = device.count()
QUEUES = (
    pytest.param("seed 0", id="emulated0"),
    pytest.param("seed 7", id="emulated7"),
    *(pytest.param("gpu", id="gpu", marks=pytest.mark.gpu) for _ in range(min(GPUS, 1))),
)


@pytest.fixture(params=QUEUES)
def queue(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A queue. ``empty`` gives memory full of 0xA5; on a GPU, writes beyond a buffer's end fail the test."""
    kind = request.param
    if kind.startswith("seed"):
        yield EmulatedQueue(EmulatedLauncher(int(kind.split()[1])))
        return
    from helpers.gpu_queue import GpuQueue

    with GpuQueue() as real:
        yield real
