"""Bounded memory for many threads: byte budgets, leased buffers, and hashing behind the encoder.

One thread per file reads and codes tensors; a second one hashes the same bytes, because SHA-256 is the slowest step
(0.4 GB/s without CPU support). A buffer is leased from the budget and goes back when both are done with it, so
memory stays bounded however far one of them lags behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from bitforbit.archive.buffers import ByteBudget, Lease
from bitforbit.archive.progress import LockedProgress, Progress
from bitforbit.cpu import default_threads
from bitforbit.format.checksum import Digests, FileHash
from bitforbit.format.header import TensorEntry

CHUNK_BYTES = 8 << 20
"""Small tensors are read and hashed together, and files copied, in pieces of this size."""

IN_FLIGHT_BYTES = 128 << 20
"""Bytes that may wait for the hash besides the largest tensor."""

CODED_BYTES = 64 << 20
"""Bytes of coded tensors held at a time besides the largest one."""

MAX_FILES_AT_ONCE = 8

T = TypeVar("T")
R = TypeVar("R")


def chunks(entries: Iterable[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Group tensors that follow each other: one large tensor, or small ones of CHUNK_BYTES together."""
    group: list[TensorEntry] = []
    size = 0
    for entry in entries:
        if group and size + entry.nbytes > CHUNK_BYTES:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.nbytes
    if group:
        yield group


class StreamHasher:
    """Hashes a file's bytes in a thread of its own, in the order of ``update``."""

    def __init__(self, sha256: bool = True) -> None:
        self._hash = FileHash(sha256)
        self._queue: queue.SimpleQueue[Lease | bytes | None] = queue.SimpleQueue()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="bitforbit-hash", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, bytes):
                self._hash.update(item)
                continue
            if not self._abandoned:
                self._hash.update(item.data)
            item.release()
            del item

    def update(self, item: Lease | bytes) -> None:
        """Append bytes, or a leased buffer, which must not change any more."""
        if isinstance(item, Lease):
            item.retain()
        self._queue.put(item)

    def digests(self) -> Digests:
        """Wait for the thread; checksums of everything appended."""
        self._queue.put(None)
        self._thread.join()
        return self._hash.digests()

    def abandon(self) -> None:
        """Stop without a result."""
        self._abandoned = True
        self._queue.put(None)
        self._thread.join()


class Pipeline:
    """What the workers of one operation share. ``largest_tensor`` in bytes decides how much memory is used.

    At most 2 x the largest tensor + IN_FLIGHT_BYTES + CODED_BYTES are held.
    """

    def __init__(self, threads: int | None, largest_tensor: int, progress: Progress | None) -> None:
        self.threads = default_threads() if threads is None else max(1, threads)
        self.original = ByteBudget(largest_tensor + IN_FLIGHT_BYTES)
        self.coded = ByteBudget(largest_tensor + CODED_BYTES)
        self.progress = LockedProgress(progress)
        self._active = 0
        self._lock = threading.Lock()

    def codec_threads(self, nbytes: int) -> int:
        """Threads for one tensor of that size: a fair share, and one for tensors that are not worth more."""
        return 1 if nbytes < 1 << 20 else max(1, self.threads // max(1, self._active))

    @contextmanager
    def hasher(self, sha256: bool = True) -> Iterator[StreamHasher]:
        """A hasher whose thread ends with the block."""
        hasher = StreamHasher(sha256)
        try:
            yield hasher
        except BaseException:
            hasher.abandon()
            raise

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[Lease]:
        """A buffer; whoever retains it inside the block keeps it longer."""
        lease = Lease(self.original, nbytes)
        try:
            yield lease
        finally:
            lease.release()

    def run(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results of ``work`` for every item, several at a time; the first error stops all and is raised."""

        def job(item: T) -> R:
            with self._lock:
                self._active += 1
            try:
                return work(item)
            finally:
                with self._lock:
                    self._active -= 1

        with ThreadPoolExecutor(max(1, min(2 * self.threads, len(items), MAX_FILES_AT_ONCE))) as pool:
            futures = [pool.submit(job, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                self.original.cancel()
                self.coded.cancel()
                raise
