"""Decoding of the next weights beside the product of the current one.

A model uses its weights in the same order again and again. The prefetcher learns it: every weight's successor is the
one that came after it the last time. When a weight is used, its successor is decoded on a side stream meanwhile:

    main stream   | decode 0 | product 0 | norms ... | product 1 | ...
    side stream              | decode 1 |            | decode 2 | ...

A wrong guess costs the time of one decoding, never a bit. Nothing is decoded ahead across the end of a pass (a link
back to a weight that was first used earlier): what is decoded is used within the pass, and between passes weights may
be changed or freed. Nor is a weight whose parts are other tensors or were written since its last use, as where weights
move to the GPU for each use: they may still be on their way. (Writes through ``.data`` are hidden from torch's own
counters, and so from this.)

Memory of decoded weights comes from torch's allocator, as memory of the main stream, and is freed as soon as the
product is enqueued; the allocator then gives the same block to the weight after the next. So two weights exist at a
time, within a graph capture they come from the graph's pool, and no block outlives its use.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bitforbit.ops.checks import Parts
from bitforbit.ops.gpu.policy import Policy
from bitforbit.ops.gpu.streams import Streams
from bitforbit.ops.gpu.weights import Geometry, Weight


class Successors:
    """Who follows whom. Shared by all streams and threads of a device; holds no weight alive."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], _Node] = {}
        self._seen = 0
        self._sweep_at = 1024

    def visit(self, weight: Weight) -> tuple[_Node, Weight]:
        """The node of a weight that is being used, and the weight, which is checked when it is seen for the first time.

        Raises UsageError, CorruptTensorError.
        """
        node = self._nodes.get(weight.key)
        if node is None or not node.alive:
            weight = weight.checked()
            if len(self._nodes) >= self._sweep_at:
                self._sweep()
            self._seen += 1
            node = self._nodes[weight.key] = _Node(weight.geometry, self._seen)
        node.note(weight)
        return node, weight

    def __len__(self) -> int:
        return len(self._nodes)

    def _sweep(self) -> None:
        self._nodes = {key: node for key, node in list(self._nodes.items()) if node.alive}
        self._sweep_at = max(1024, 2 * len(self._nodes))


class _Node:
    """A weight's place in the order, and its state when it was last used."""

    def __init__(self, geometry: Geometry, first_seen: int) -> None:
        self.first_seen = first_seen
        self.next: _Node | None = None
        self.changes = 0
        """How often it had other contents than at the use before, as far as torch tells."""
        self._geometry = geometry
        self._key: tuple[Any, ...] = ()
        self._parts: tuple[weakref.ref[torch.Tensor], ...] = ()
        self._versions: tuple[int, ...] | None = None
        self._storages: list[StorageWeakRef] = []
        """As long as these exist, no other storage has the same number."""

    def note(self, weight: Weight) -> None:
        """The weight is being used as it is now."""
        self._key = weight.key
        self._parts = tuple(map(weakref.ref, weight.parts))
        versions = weight.versions
        if not self._has_storages_of(weight.parts):
            self._storages = [StorageWeakRef(part.untyped_storage()) for part in weight.parts]
            self.changes += 1
        elif versions != self._versions:
            self.changes += 1
        self._versions = versions

    @property
    def alive(self) -> bool:
        return all(part() is not None for part in self._parts)

    def weight(self) -> Weight | None:
        """The weight, if it still is as it was when it was last used.

        If it is not, whoever changed it may have told the stream of its next use alone when the change is complete.
        """
        a, b, c, d = (part() for part in self._parts)
        if a is None or b is None or c is None or d is None:
            return None
        weight = Weight(self._geometry, (a, b, c, d))
        if weight.key != self._key or self._versions is None or weight.versions != self._versions:
            return None
        return weight if self._has_storages_of(weight.parts) else None

    def follower(self) -> _Node | None:
        """What is used next in the same pass."""
        return self.next if self.next is not None and self.next.first_seen > self.first_seen else None

    def _has_storages_of(self, parts: Parts) -> bool:
        return [part.untyped_storage()._cdata for part in parts] == [storage.cdata for storage in self._storages]


@dataclass
class _Ahead:
    """A weight that is decoded, or being decoded on the side stream."""

    weight: Weight
    storages: list[torch.UntypedStorage]
    """Of the parts, whose memory stays as it is until the main stream has waited, whatever becomes of the tensors."""
    changes: int
    """Of the weight, when its decoding began."""
    matrix: torch.Tensor
    mark: Any
    """None once the main stream waits for it."""


class Prefetcher:
    """Decodes weights for the work of one thread on one stream."""

    def __init__(self, streams: Streams, successors: Successors, policy: Policy, status: int = 0) -> None:
        self._streams = streams
        self._successors = successors
        self.policy = policy
        self._status = status
        self._last: _Node | None = None
        self._ahead: dict[tuple[Any, ...], _Ahead] = {}

    @property
    def capturing(self) -> bool:
        """Whether the work is recorded into a graph."""
        return self._streams.capturing

    def multiply(
        self, weight: Weight, tokens: int, product: Callable[[torch.Tensor], torch.Tensor], alone: bool = False
    ) -> torch.Tensor:
        """``product(matrix)`` for the decoded matrix of a weight, which is not valid afterwards.

        ``product`` enqueues its work on the main stream. ``alone``: nothing is decoded ahead.
        """
        node, weight = self._successors.visit(weight)
        if self._last is not None:
            self._last.next = node
        self._last = node
        matrix = self._take(node, weight)
        if matrix is None:
            matrix = weight.matrix(self._streams.empty)
            weight.decode(self._streams.main, matrix, self._status)
        wanted = [] if alone or tokens < self.policy.least_tokens else self._allocate(node, weight)
        if not wanted:
            return product(matrix)
        self._streams.fork()
        if self.policy.product_first:
            out = product(matrix)
        self._start(wanted)
        if not self.policy.product_first:
            out = product(matrix)
        if self._streams.capturing or not self.policy.join_at_use:
            self._join()
        return out

    def multiply_apart(self, weight: Weight, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """As :meth:`multiply`, all on the main stream: nothing is remembered of the weight, nor decoded ahead."""
        self.pass_by()
        self._last = None
        weight = weight.checked()
        matrix = weight.matrix(self._streams.empty)
        weight.decode(self._streams.main, matrix, self._status)
        return product(matrix)

    def discard(self) -> None:
        """Free what was decoded ahead."""
        for key in list(self._ahead):
            self._drop(key)

    def pass_by(self, parts: Parts | None = None) -> None:
        """A product was enqueued that decodes nothing, maybe in the stead of one that would: free what waits for it.

        With the product's ``parts``, nothing is freed that waits for another weight.
        """
        addresses = None if parts is None else tuple(part.data_ptr() for part in parts)
        if self._ahead and (addresses is None or any(key[: len(addresses)] == addresses for key in self._ahead)):
            self.discard()
            if self._last is not None:
                self._last.next = None

    def abandon(self) -> None:
        """Free what was decoded ahead in a graph capture that is over: nothing of it runs any more."""
        self._ahead.clear()

    def __del__(self) -> None:
        # At the end of a thread: no memory is freed that the side stream still works on.
        if not sys.is_finalizing():
            self.discard()

    def _take(self, node: _Node, weight: Weight) -> torch.Tensor | None:
        """The matrix of a weight that was decoded ahead; what should have been used before it is dropped."""
        found = self._ahead.get(weight.key)
        for key in list(self._ahead):
            if found is not None and key == weight.key:
                break
            self._drop(key)
        if found is None:
            return None
        if found.changes != node.changes:
            self._drop(weight.key)
            return None
        del self._ahead[weight.key]
        self._wait(found)
        return found.matrix

    def _allocate(self, node: _Node, current: Weight) -> list[_Ahead]:
        """Followers that are to be decoded now, with their memory."""
        wanted: list[_Ahead] = []
        budget = self.policy.scratch_bytes
        used = current.nbytes
        follower = node.follower()
        for _ in range(self.policy.ahead):
            weight = None if follower is None else follower.weight()
            if follower is None or weight is None:
                break
            used += weight.nbytes
            if budget is not None and used > budget:
                break
            if weight.key not in self._ahead and weight.key != current.key:
                try:
                    matrix = weight.matrix(self._streams.empty)
                except torch.OutOfMemoryError:
                    break  # decoded when it is used, then
                storages = [part.untyped_storage() for part in weight.parts]
                wanted.append(_Ahead(weight, storages, follower.changes, matrix, None))
            follower = follower.follower()
        return wanted

    def _start(self, wanted: list[_Ahead]) -> None:
        self._streams.follow()
        for ahead in wanted:
            try:
                ahead.weight.decode(self._streams.side, ahead.matrix, self._status)
            except BaseException:
                # Part of it may be enqueued: the main stream waits for that before the memory is freed.
                self._streams.join(self._streams.mark())
                raise
            ahead.mark = self._streams.mark()
            self._ahead[ahead.weight.key] = ahead

    def _join(self) -> None:
        for ahead in self._ahead.values():
            self._wait(ahead)

    def _drop(self, key: tuple[Any, ...]) -> None:
        self._wait(self._ahead[key])
        del self._ahead[key]

    def _wait(self, ahead: _Ahead) -> None:
        if ahead.mark is not None:
            self._streams.join(ahead.mark)
            ahead.mark = None
