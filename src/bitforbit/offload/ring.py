"""Which block is in which slot, and what is fetched next.

    runs      | block 0   | block 1   | block 2   | ...
    arrives     1, 2      | 3         | 4         | ...       ahead = 2: three slots

A block's successor is the one that came after it the last time; before that, the next in the order given, and the first
after the last, as for the next token. A wrong guess costs time, never a bit. A slot is filled again when the work that
its block had enqueued by the end of its forward has ended; its block may run again without being fetched until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bitforbit.offload.movers import Filling, Mover, declared_empty
from bitforbit.offload.stores import Store

_ALIKE = 1.125
"""Ratio of the sizes of blocks that are taken for equal: compressed layers differ a little."""


@dataclass(eq=False)
class _Slot:
    memory: torch.Tensor
    block: int | None = None
    """What it holds, or is being filled with."""
    filling: Filling | None = None
    users: int = 0
    """Forwards of the block that are under way."""
    marks: dict[int, Any] = field(default_factory=dict)
    """The work that reads it, by stream."""
    used: int = 0
    """When that was."""
    extra: bool = False
    """Made because all others were in use; goes when its block has run."""


def slot_sizes(sizes: Sequence[int], ahead: int) -> list[int]:
    """Bytes of the slots for blocks of these sizes: any ``ahead + 1`` of them fit at a time.

    Only blocks of about the same size fit all slots: a head that is much larger than the layers has one slot.
    """
    largest = sorted(sizes, reverse=True)[: ahead + 1]
    return [max(size for size in sizes if size <= _ALIKE * slot) for slot in largest]


class Ring:
    """The slots of one device. Calls must not overlap: who shares it between threads locks it."""

    def __init__(self, stores: Sequence[Store], mover: Mover, ahead: int) -> None:
        """``stores`` are the blocks' images, in the order in which they run."""
        self._stores = stores
        self._mover = mover
        self._ahead = ahead
        self._slots = [_Slot(declared_empty(mover, n)) for n in slot_sizes([s.nbytes for s in stores], ahead)]
        self._next = {block: (block + 1) % len(stores) for block in range(len(stores))}
        self._last: int | None = None
        self._clock = 0
        self.fetched = 0
        """How many blocks were fetched so far."""
        self.late = 0
        """How many of them were asked for only when they were to run."""

    @property
    def nbytes(self) -> int:
        """Memory of the slots on the device."""
        return sum(slot.memory.numel() for slot in self._slots)

    def enter(self, block: int) -> torch.Tensor:
        """A block is to run: its image, as the caller's stream sees it until :meth:`leave`. Raises BlockReadError."""
        if self._last is not None:
            self._next[self._last] = block
        self._last = block
        slot = self._slot_of(block)
        if slot is None:
            self.late += 1
            slot = self._claim(block)
            self._fill(slot, block)
        slot.users += 1
        try:
            assert slot.filling is not None
            self._mover.ready(slot.filling, slot.memory)
        except BaseException:
            slot.users -= 1
            self._forget(slot)
            if slot.extra:
                self._slots.remove(slot)
            raise
        self._clock += 1
        slot.used = self._clock
        self._fetch_followers(block)
        return slot.memory[: self._stores[block].nbytes]

    def leave(self, block: int) -> None:
        """A block has run: all that reads its image is enqueued on the caller's stream."""
        slot = self._slot_of(block)
        assert slot is not None
        slot.users -= 1
        self._mover.mark(slot.marks)
        if slot.users == 0:
            if slot.extra:
                self._slots.remove(slot)
            self._fetch_followers(block)

    def _slot_of(self, block: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == block), None)

    def _followers(self, block: int) -> list[int]:
        """The blocks that are expected to run next, soonest first."""
        found: list[int] = []
        follower = self._next[block]
        while len(found) < self._ahead and follower != block and follower not in found:
            found.append(follower)
            follower = self._next[follower]
        return found

    def _fetch_followers(self, block: int) -> None:
        followers = self._followers(block)
        for follower in followers:
            if self._slot_of(follower) is None:
                slot = self._free_slot(self._stores[follower].nbytes, {block, *followers})
                if slot is not None:
                    self._fill(slot, follower)

    def _free_slot(self, nbytes: int, wanted: set[int]) -> _Slot | None:
        """The smallest slot of that size that holds none of the blocks wanted; of several, the one used longest ago."""
        fitting = [
            slot
            for slot in self._slots
            if not slot.users and not slot.extra and slot.block not in wanted and slot.memory.numel() >= nbytes
        ]
        return min(fitting, key=lambda slot: (slot.memory.numel(), slot.used), default=None)

    def _claim(self, block: int) -> _Slot:
        """A slot for a block that is to run now."""
        nbytes, followers = self._stores[block].nbytes, self._followers(block)
        for kept in range(len(followers), -1, -1):
            slot = self._free_slot(nbytes, set(followers[:kept]))
            if slot is not None:
                return slot
        slot = _Slot(declared_empty(self._mover, nbytes), extra=True)
        self._slots.append(slot)
        return slot

    def _fill(self, slot: _Slot, block: int) -> None:
        self._forget(slot)
        torch.autograd.graph.increment_version(slot.memory)  # to whoever still has tensors of the block before
        slot.filling = self._mover.fill(self._stores[block], slot.memory, list(slot.marks.values()))
        slot.marks.clear()
        slot.block = block
        self.fetched += 1

    def _forget(self, slot: _Slot) -> None:
        if slot.filling is not None:
            slot.filling.settle()
        slot.block = slot.filling = None
