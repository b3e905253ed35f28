"""Streams of a GPU on paper: work is noted when it is enqueued and done later, in any order that events allow.

Memory is an array in which freed blocks are handed out again at once, as torch's allocator does for the stream that
they belong to. Whatever two pieces of work touch the same bytes, one of them writing, must be in an order that streams
and events guarantee, else RaceError: so a missing event shows whether or not the order drawn exposes it.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

BOUNDARY = 64

Clock = dict[str, int]
"""How much of each stream's work comes before."""


class RaceError(AssertionError):
    """Two pieces of work on the same memory in no order."""


@dataclass
class Work:
    name: str
    stream: str
    before: Clock
    run: Callable[[], None]
    done: bool = False


@dataclass
class Access:
    begin: int
    end: int
    writes: bool
    stream: str
    position: int
    name: str
    in_place: bool = False
    """A change in place of a weight: the prefetcher finds out and drops what it may have decoded meanwhile."""


@dataclass
class Queue:
    """A stream; what kernels are launched through."""

    simulation: Simulation
    stream: str
    work: list[Work] = field(default_factory=list)
    clock: Clock = field(default_factory=dict)

    def enqueue(
        self,
        name: str,
        run: Callable[[], None],
        reads: list[tuple[int, int]],
        writes: list[tuple[int, int]],
        in_place: bool = False,
    ) -> None:
        """``reads`` and ``writes``: begin and end of memory that is touched."""
        self.clock[self.stream] = self.clock.get(self.stream, 0) + 1
        self.work.append(Work(name, self.stream, dict(self.clock), run))
        for places, is_write in ((reads, False), (writes, True)):
            for begin, end in places:
                self.simulation.touch(self, Access(begin, end, is_write, self.stream, len(self.work), name, in_place))
        self.simulation.names.append(f"{self.stream}: {name}")
        self.simulation.go_on()


class Simulation:
    """The streams ``main`` and ``side`` of one device; also the protocol Streams, which the prefetcher works through.

    ``pace``: how many pieces of work are tried after each that is enqueued; 0 leaves everything to :meth:`synchronize`.
    """

    def __init__(self, seed: int = 0, pace: int = 1, capturing: bool = False, nbytes: int = 1 << 16) -> None:
        self.main, self.side = Queue(self, "main"), Queue(self, "side")
        self.capturing = capturing
        self.memory = np.full(nbytes, 0xEE, np.uint8)
        self.names: list[str] = []
        self.used = self.peak = 0
        self._random = random.Random(seed)
        self._pace = pace
        self._noted: Clock = {}
        self._accesses: list[Access] = []
        self._free: list[tuple[int, int]] = []
        self._top = 0

    # --- memory ------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Streams."""
        return self.bytes(shape[0] * shape[1] * dtype.itemsize).view(dtype).view(shape)

    def bytes(self, nbytes: int) -> torch.Tensor:
        """Memory of the main stream; the block freed last that is large enough comes first."""
        size = -(-max(nbytes, 1) // BOUNDARY) * BOUNDARY
        fitting = [block for block in self._free if block[1] >= size]
        if fitting:
            begin, found = fitting[-1]
            self._free.remove((begin, found))
            if found > size:
                self._free.append((begin + size, found - size))
        else:
            begin, self._top = self._top, self._top + size
            assert self._top <= len(self.memory), "the simulated memory is full"
        block = self.memory[begin : begin + nbytes]
        self.used += size
        self.peak = max(self.peak, self.used)
        weakref.finalize(block, self._give_back, begin, size)
        return torch.from_numpy(block)

    def _give_back(self, begin: int, size: int) -> None:
        self.used -= size
        self._free.append((begin, size))

    def place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Begin and end of a tensor in the memory."""
        begin = tensor.data_ptr() - self.memory.ctypes.data
        return begin, begin + tensor.numel() * tensor.element_size()

    def place_at(self, address: int, nbytes: int) -> tuple[int, int]:
        """Begin and end of memory by its address."""
        begin = address - self.memory.ctypes.data
        return begin, begin + nbytes

    # --- order ---------------------------------------------------------------------------------------------------

    def fork(self) -> None:
        self._noted = dict(self.main.clock)

    def follow(self) -> None:
        _merge(self.side.clock, self._noted)

    def mark(self) -> Clock:
        return dict(self.side.clock)

    def join(self, mark: Clock) -> None:
        _merge(self.main.clock, mark)

    @property
    def open_side_work(self) -> bool:
        """Whether the main stream does not wait for all side work."""
        return self.main.clock.get("side", 0) < len(self.side.work)

    def touch(self, queue: Queue, access: Access) -> None:
        for other in self._accesses:
            overlap = access.begin < other.end and other.begin < access.end
            if access.in_place and not other.writes:
                continue
            ordered = other.stream == access.stream or queue.clock.get(other.stream, 0) >= other.position
            if overlap and (access.writes or other.writes) and not ordered:
                raise RaceError(f"{access.name} on {access.stream} against {other.name} on {other.stream}")
        self._accesses.append(access)

    # --- execution -----------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        for _ in range(self._pace):
            self._step(self._random.choice((self.main, self.side)))

    def synchronize(self) -> None:
        """Do all that is enqueued."""
        while any(not work.done for queue in (self.main, self.side) for work in queue.work):
            queues = [self.main, self.side]
            self._random.shuffle(queues)
            assert any(self._step(queue) for queue in queues), "every stream waits for another one"

    def _step(self, queue: Queue) -> bool:
        work = next((work for work in queue.work if not work.done), None)
        if work is None:
            return False
        for other in (self.main, self.side):
            if other is not queue and not all(w.done for w in other.work[: work.before.get(other.stream, 0)]):
                return False
        work.run()
        work.done = True
        return True


def _merge(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)
