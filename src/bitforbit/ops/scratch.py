"""Memory for decoded weights that is used again and again: fresh pages cost more than decoding into them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitforbit.cpu import planes

DEFAULT_LIMIT = 1 << 29
"""Bytes that a pool keeps between calls."""


class ScratchPool:
    """Buffers that calls borrow, each by one thread at a time; those that would exceed the limit are not kept."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._free: list[torch.Tensor] = []
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie ready."""
        return self._kept_bytes

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[torch.Tensor]:
        """A uint8 tensor ``[nbytes]`` with arbitrary contents, valid within the ``with`` block only."""
        buffer = self._take(nbytes)
        try:
            yield buffer[:nbytes]
        finally:
            self._give_back(buffer)

    def clear(self) -> None:
        """Free what lies ready."""
        with self._lock:
            self._free.clear()
            self._kept_bytes = 0

    def _take(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            if self._free:
                # The largest lies last. One too small is dropped for a larger one: the pool grows, it does not pile up.
                buffer = self._free.pop()
                self._kept_bytes -= buffer.numel()
                if buffer.numel() >= nbytes:
                    return buffer
        return torch.from_numpy(planes.empty(nbytes))

    def _give_back(self, buffer: torch.Tensor) -> None:
        with self._lock:
            if self._kept_bytes + buffer.numel() <= self.limit:
                self._free.append(buffer)
                self._free.sort(key=torch.Tensor.numel)
                self._kept_bytes += buffer.numel()


SCRATCH = ScratchPool()
"""The pool of the operators."""
