"""What kernels found wrong: a word per device, into which they set bits, read without waiting for them.

On a GPU the word lies in pinned host memory, so that reading it costs nothing. As with torch's own checks on a GPU, an
error is therefore reported by a later call than the one that caused it; the bad call gives zeros or wrong weights.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from bitforbit.errors import CorruptTensorError

CORRUPT = 1
OUT_OF_RANGE = 2


class Status:
    """The word of one device."""

    def __init__(self, pinned: bool) -> None:
        self._memory = torch.zeros(16, dtype=torch.int32, pin_memory=pinned)
        self.address: int = self._memory.data_ptr()
        self._word = ctypes.c_uint32.from_address(self.address)

    def check(self, where: str) -> None:
        """Raise what has been found so far, once: IndexError, CorruptTensorError."""
        found = self._word.value
        if not found:
            return
        self._word.value = 0
        if found & CORRUPT:
            raise CorruptTensorError(
                f"expected compressed weights on {where} whose counts and codes fit, got others; results since the "
                "last check are wrong: load the model again, and check its files with bitforbit verify"
            )
        raise IndexError(
            f"index out of range: expected ids of an embedding on {where} to be row numbers of its weight, got others; "
            "their rows were zeros"
        )


_words: dict[torch.device, Status] = {}
_lock = threading.Lock()


def of(device: torch.device) -> Status:
    """The word of a device; made at the first call, which must not be within a graph capture."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _words.get(device)
    if found is None:
        with _lock:
            if device not in _words:
                _words[device] = Status(device.type == "cuda")
            found = _words[device]
    return found
