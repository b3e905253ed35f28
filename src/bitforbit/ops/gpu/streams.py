"""Two streams of one device for work that overlaps: torch's current one, and one beside it.

What the prefetcher needs of streams is written down as a protocol, so that its schedule can be tested without a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bitforbit.cuda.queue import Queue
from bitforbit.ops.gpu import queues


class Streams(Protocol):
    """A main stream, on which the caller works, and a side stream. Memory belongs to the main stream.

    Memory that is freed may be used by the next work on the main stream at once: who frees memory that the side stream
    works on has to let the main stream wait first.
    """

    main: Queue
    side: Queue

    @property
    def capturing(self) -> bool:
        """Whether the main stream is recorded into a graph, in which no side work may be left open."""
        ...

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized matrix."""
        ...

    def fork(self) -> None:
        """Note the work that the main stream has by now, for :meth:`follow`."""
        ...

    def follow(self) -> None:
        """Work enqueued on the side stream from now on waits for the work noted by :meth:`fork`."""
        ...

    def mark(self) -> Any:
        """The work that the side stream has by now."""
        ...

    def join(self, mark: Any) -> None:
        """Work enqueued on the main stream from now on waits for the marked work. Once per mark."""
        ...


class OneStream:
    """Main and side stream are the same: for the emulation, which ends each launch before the next one."""

    capturing = False

    def __init__(self, queue: queues.TensorQueue) -> None:
        self.main: Queue = queue
        self.side: Queue = queue
        self._device = queue.device

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized matrix."""
        nbytes = shape[0] * shape[1] * int(dtype.itemsize)
        return queues.empty_bytes(nbytes, self._device).view(dtype).view(shape)

    def fork(self) -> None:
        """Nothing to do."""

    def follow(self) -> None:
        """Nothing to do."""

    def mark(self) -> None:
        """Nothing to do."""

    def join(self, mark: None) -> None:
        """Nothing to do."""


class CudaStreams:
    """A stream of torch's and one beside it, with events of their own.

    Events are used again: waiting for one refers to its last recording before the wait. Objects of this class live for
    one graph capture at most, so that no capture waits for an event recorded outside of it.
    """

    def __init__(self, device: torch.device, stream: Any, side: Any, capturing: bool) -> None:
        self.capturing = capturing
        self._device = device
        self._main = stream
        self._side = side
        self.main: Queue = queues.cuda_queue(device, stream.cuda_stream)
        self.side: Queue = queues.cuda_queue(device, self._side.cuda_stream)
        self._forked = torch.cuda.Event()
        self._free: list[Any] = []

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized matrix from torch's allocator (within a capture: from the graph's pool)."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def fork(self) -> None:
        """See Streams."""
        self._forked.record(self._main)

    def follow(self) -> None:
        """See Streams."""
        self._side.wait_event(self._forked)

    def mark(self) -> Any:
        """See Streams."""
        event = self._free.pop() if self._free else torch.cuda.Event()
        event.record(self._side)
        return event

    def join(self, mark: Any) -> None:
        """See Streams."""
        self._main.wait_event(mark)
        self._free.append(mark)
