"""Host memory that a GPU's copy engine reads at full speed, in any size.

Torch's own pinned memory comes in powers of two, up to twice what is asked for; for most of a model that is too much.
So the memory is the system's, and the CUDA runtime is told of it.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import torch

from bitforbit.archive.buffers import aligned_buffer
from bitforbit.codecs.base import Bytes

_log = logging.getLogger("bitforbit")

_LEAST_BYTES = 2 << 20
"""From here on the memory has pages of its own: no page may be registered twice."""


def empty(nbytes: int, device: torch.device, stream: Any) -> torch.Tensor:
    """Uninitialized bytes, uint8 ``[nbytes]``, pinned for copies to a CUDA device on ``stream`` of it alone.

    Where the system does not let so much be pinned, they are not, with a line in the log: copies are slower then.
    """
    memory = aligned_buffer(max(nbytes, _LEAST_BYTES))[:nbytes]
    tensor = torch.from_numpy(memory)
    if nbytes:
        with torch.cuda.device(device):
            problem = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, 0))
        if problem:
            _log.warning("%d bytes of host memory are not pinned (CUDA error %d): copies are slower", nbytes, problem)
            with contextlib.suppress(RuntimeError):  # the next launch reports that error, whosoever it is
                torch.ones(1, device=device)
        else:
            finalizer = weakref.finalize(tensor, _release, tensor.data_ptr(), device, stream, memory)
            finalizer.atexit = False
    return tensor


def _release(address: int, device: torch.device, stream: Any, memory: Bytes) -> None:
    with torch.cuda.device(device):
        stream.synchronize()  # copies from the memory may be under way, of which torch knows nothing
        torch.cuda.cudart().cudaHostUnregister(address)
    del memory
