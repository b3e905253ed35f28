"""Memory for tensors: aligned buffers, and budgets that bound how much of it is held at a time."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bitforbit.codecs.base import PART_ALIGNMENT, Bytes
from bitforbit.errors import CorruptTensorError, TruncatedFileError

_HUGE_PAGE_BYTES = 2 << 20


class Cancelled(Exception):  # noqa: N818 - a signal between threads, not an error
    """Another thread failed; its error is the one to report."""


def aligned_buffer(nbytes: int) -> Bytes:
    """Uninitialised bytes, aligned to 64, given back to the system when dropped if large.

    Raises CorruptTensorError if there is not that much memory: only a damaged header asks for it.
    """
    try:
        if nbytes < _HUGE_PAGE_BYTES:
            room = np.empty(nbytes + PART_ALIGNMENT, dtype=np.uint8)
            begin = -room.ctypes.data % PART_ALIGNMENT
            return room[begin : begin + nbytes]
        pages = mmap.mmap(-1, nbytes)
    except (OSError, MemoryError) as e:
        raise CorruptTensorError(f"expected to hold {nbytes} bytes in memory, got {e}; is the file damaged?") from e
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 4 * _HUGE_PAGE_BYTES:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def read_exactly(fd: int, out: Bytes, offset: int, where: str) -> None:
    """Fill ``out`` from byte ``offset`` of the file. Raises TruncatedFileError."""
    view = memoryview(out.data)
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise TruncatedFileError(f"{where}: expected {len(view)} bytes at {offset}, got {done}; the file changed")
        done += count


class ByteBudget:
    """Bytes that may be held at a time. One request larger than the whole budget is served alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._cancelled = False
        self._changed = threading.Condition()

    def acquire(self, nbytes: int) -> None:
        """Wait until there is room. Raises Cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or not self._used or self._used + nbytes <= self._limit)
            if self._cancelled:
                raise Cancelled
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        """Give room back."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()

    def cancel(self) -> None:
        """Wake everyone with Cancelled, for good."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Room for the duration of a block."""
        self.acquire(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)


class Lease:
    """A buffer of the budget, shared by those who retained it; the last release gives it back."""

    def __init__(self, budget: ByteBudget, nbytes: int) -> None:
        budget.acquire(nbytes)
        self._budget = budget
        self._nbytes = nbytes
        self._owners = 1
        self._lock = threading.Lock()
        try:
            self.data: Bytes = aligned_buffer(nbytes)
        except BaseException:
            budget.release(nbytes)
            raise

    def retain(self) -> None:
        """One more owner."""
        with self._lock:
            self._owners += 1

    def release(self) -> None:
        """One owner less."""
        with self._lock:
            self._owners -= 1
            last = self._owners == 0
        if last:
            del self.data
            self._budget.release(self._nbytes)
