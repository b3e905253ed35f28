"""Moves the images of blocks to the device that computes: what the schedule (:mod:`bitforbit.offload.ring`) asks for.

On a GPU a block in host memory is one copy on a side stream. Of a block in files, threads read chunks into pinned
staging memory and enqueue their copies there as well. On a CPU the threads read straight into the slot.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from bitforbit.offload import pinned
from bitforbit.offload.stores import CHUNK_BYTES, Chunk, Store
from bitforbit.ops.gpu import volatile

READERS = 2
"""Threads that read files, each a chunk at a time."""
_STAGES = READERS + 2
"""Chunks of staging memory: some are being read into, others copied from."""


class Filling:
    """A slot that is being filled."""

    def __init__(self) -> None:
        self.futures: list[Future[None]] = []
        self.event: Any = None
        """On a GPU: the end of the copies. Valid when all futures are done."""

    def join(self) -> None:
        """Wait for the threads' part of it. Raises what went wrong first, after all of it has come to an end."""
        problems = [future.exception() for future in self.futures]
        for problem in problems:
            if problem is not None:
                raise problem

    def settle(self) -> None:
        """Wait until nothing of it runs in a thread any more, however it ended; what has not begun never does."""
        for future in self.futures:
            if not future.cancel():
                future.exception()


class Mover(Protocol):
    """A device that computes, and the way to it."""

    device: torch.device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory for a slot, uint8 ``[nbytes]``."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory for an image that stays there."""
        ...

    def mark(self, marks: dict[int, Any]) -> None:
        """Note, under the number of the caller's stream, the work on the device that it has by now."""
        ...

    def fill(self, store: Store, slot: torch.Tensor, after: Collection[Any]) -> Filling:
        """Begin to fill a slot with an image, once all the marked work has ended. Does not wait."""
        ...

    def ready(self, filling: Filling, slot: torch.Tensor) -> None:
        """Let the caller's work from now on see the whole image. Raises BlockReadError."""
        ...


class CpuMover:
    """Slots in host memory, for computing on the CPU."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="bitforbit-reader")

    def empty(self, nbytes: int) -> torch.Tensor:
        """See Mover."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Mover."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self, marks: dict[int, Any]) -> None:
        """Work has ended when a call returns."""

    def fill(self, store: Store, slot: torch.Tensor, after: Collection[Any]) -> Filling:
        """See Mover."""
        filling = Filling()
        if store.in_memory is not None:
            filling.futures = [self._readers.submit(_copy, store.in_memory, slot)]
        else:
            out = slot.numpy()
            filling.futures = [
                self._readers.submit(store.read, chunk, out[chunk.begin : chunk.end]) for chunk in store.chunks
            ]
        return filling

    def ready(self, filling: Filling, slot: torch.Tensor) -> None:
        """See Mover."""
        filling.join()


def _copy(image: torch.Tensor, slot: torch.Tensor) -> None:
    # Not by torch: a thread of its own would start torch's pool again.
    slot.numpy()[: image.numel()] = image.numpy()


class CudaMover:
    """Slots in a GPU's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self._side = torch.cuda.Stream(self.device)
        self._readers: ThreadPoolExecutor | None = None
        self._stages: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()

    def empty(self, nbytes: int) -> torch.Tensor:
        """See Mover."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # Torch's allocator gives memory that is freed to its own stream at once: copies may still be on their way.
        memory.record_stream(self._side)
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # for whatever had the memory before
        return memory

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See Mover."""
        return pinned.empty(nbytes, self.device, self._side)

    def mark(self, marks: dict[int, Any]) -> None:
        """See Mover."""
        stream = torch.cuda.current_stream(self.device)
        event = marks[stream.cuda_stream] = torch.cuda.Event()
        event.record(stream)

    def fill(self, store: Store, slot: torch.Tensor, after: Collection[Any]) -> Filling:
        """See Mover."""
        filling, side = Filling(), self._side
        for event in after:
            side.wait_event(event)  # chunks are enqueued there too, later
        filling.event = torch.cuda.Event()
        image = store.in_memory
        if image is not None:
            with torch.cuda.stream(side):
                slot[: image.numel()].copy_(image, non_blocking=True)
            filling.event.record(side)
            return filling
        last = _Last(len(store.chunks), filling.event, side)
        readers = self._start_readers()
        filling.futures = [
            readers.submit(_send, store, chunk, slot, side, self._stages, last) for chunk in store.chunks
        ]
        return filling

    def ready(self, filling: Filling, slot: torch.Tensor) -> None:
        """See Mover."""
        filling.join()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(filling.event)
        slot.record_stream(stream)  # the slot's memory may be freed while the block runs

    def _start_readers(self) -> ThreadPoolExecutor:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="bitforbit-reader")
            for _ in range(_STAGES):
                self._stages.put((self.pinned(CHUNK_BYTES), None))
        return self._readers


class _Last:
    """Records an event behind the last of several copies, which threads enqueue."""

    def __init__(self, count: int, event: Any, side: Any) -> None:
        self._left = count
        self._event = event
        self._side = side
        self._lock = threading.Lock()

    def done(self) -> None:
        """One more is enqueued."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._event.record(self._side)


def _send(
    store: Store, chunk: Chunk, slot: torch.Tensor, side: Any,
    stages: queue.SimpleQueue[tuple[torch.Tensor, Any]], last: _Last,
) -> None:  # fmt: skip
    """Read a chunk and enqueue its copy. Knows nothing of the mover, which may be deleted meanwhile."""
    stage, copied = stages.get()
    try:
        if copied is not None:
            copied.synchronize()
        memory = stage[: chunk.end - chunk.begin]
        store.read(chunk, memory.numpy())
        with torch.cuda.stream(side):
            slot[chunk.begin : chunk.end].copy_(memory, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(side)
        last.done()
    finally:
        stages.put((stage, copied))


def mover_for(device: torch.device) -> Mover:
    """The mover to a device."""
    return CudaMover(device) if device.type == "cuda" else CpuMover()


def declared_empty(mover: Mover, nbytes: int) -> torch.Tensor:
    """Memory for a slot, of which nothing is remembered by those who decode ahead."""
    # Not of inference mode, in which torch counts no changes.
    with torch.inference_mode(False), torch.no_grad():
        memory = mover.empty(nbytes)
    volatile.declare(memory)
    return memory
