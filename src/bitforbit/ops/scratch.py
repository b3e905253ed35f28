"""Memory for decoded weights that is used again and again: fresh pages cost more than decoding into them."""

from __future__ import annotations

import threading

import torch

from bitforbit.cpu import planes
from bitforbit.cpu.planes import Bytes

DEFAULT_LIMIT = 1 << 29
"""Bytes that a pool keeps between calls."""


class Buffer:
    """Memory for one decoded weight."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = planes.empty(nbytes)
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def bytes(self, nbytes: int) -> Bytes:
        """The first bytes of the buffer."""
        return self._bytes[:nbytes]

    def matrix(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """A matrix at the begin of the buffer."""
        flat = self._typed.get(dtype)
        if flat is None:
            whole = self.nbytes // dtype.itemsize * dtype.itemsize
            flat = self._typed[dtype] = torch.from_numpy(self._bytes[:whole]).view(dtype)
        return flat.as_strided((rows, cols), (cols, 1))


class ScratchPool:
    """Buffers that calls borrow, each by one call at a time; those that would exceed the limit are not kept."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie ready."""
        return sum(buffer.nbytes for buffer in self._free)

    def borrow(self, nbytes: int) -> Buffer:
        """A buffer of at least ``nbytes`` with arbitrary contents, to be handed to :meth:`give_back`."""
        with self._lock:
            # The largest lies last. One too small is dropped for a larger one: the pool grows, it does not pile up.
            buffer = self._free.pop() if self._free else None
        return buffer if buffer is not None and buffer.nbytes >= nbytes else Buffer(nbytes)

    def give_back(self, buffer: Buffer) -> None:
        """Keep a buffer for the next call, or free it."""
        with self._lock:
            if self.kept_bytes + buffer.nbytes <= self.limit:
                self._free.append(buffer)
                if len(self._free) > 1:
                    self._free.sort(key=lambda kept: kept.nbytes)

    def clear(self) -> None:
        """Free what lies ready."""
        with self._lock:
            self._free.clear()


SCRATCH = ScratchPool()
"""The pool of the operators."""
