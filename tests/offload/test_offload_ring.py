"""Which block is in which slot: against a mover that fills at the last moment, and spoils what is not ready."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import pytest
import torch

from bitforbit.errors import BlockReadError
from bitforbit.offload.image import Image
from bitforbit.offload.movers import Filling
from bitforbit.offload.ring import Ring, slot_sizes
from bitforbit.offload.stores import HostStore, Store


class LateMover:
    """Copies only when a block is to run; until then its slot holds nonsense."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.pending: dict[int, Store] = {}
        self.filled: list[str] = []
        self.broken: set[str] = set()
        self.largest = 0
        self.allocated = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        self.allocated += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        raise AssertionError

    def mark(self, marks: dict[int, Any]) -> None:
        marks[0] = "used"

    def fill(self, store: Store, slot: torch.Tensor, after: Collection[Any]) -> Filling:
        slot.fill_(0xEE)
        self.pending[slot.data_ptr()] = store
        self.filled.append(store.name)  # type: ignore[attr-defined]
        return Filling()

    def ready(self, filling: Filling, slot: torch.Tensor) -> None:
        store = self.pending.pop(slot.data_ptr(), None)
        if store is None:
            return
        if store.name in self.broken:  # type: ignore[attr-defined]
            raise BlockReadError(f"{store.name} is broken")  # type: ignore[attr-defined]
        assert store.in_memory is not None
        slot[: store.nbytes] = store.in_memory


def ring(sizes: list[int], ahead: int = 2) -> tuple[Ring, LateMover, list[torch.Tensor]]:
    images = [torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate(sizes)]
    stores = [HostStore(str(number), Image({}, len(image)), image) for number, image in enumerate(images)]
    mover = LateMover()
    return Ring(stores, mover, ahead), mover, images


def run(made: Ring, block: int, images: list[torch.Tensor]) -> None:
    assert torch.equal(made.enter(block), images[block])
    made.leave(block)


def test_blocks_are_on_their_way_before_they_run() -> None:
    made, mover, images = ring([10] * 6)
    assert made.enter(0).tolist() == [0] * 10
    assert mover.filled == ["0", "1", "2"]
    made.leave(0)
    made.enter(1)
    assert mover.filled == ["0", "1", "2", "3"]
    made.leave(1)
    for block in [2, 3, 4, 5, 0, 1] * 3:
        run(made, block, images)
    assert made.late == 1  # the very first one
    assert mover.allocated == 30


def test_the_first_block_of_the_next_pass_is_on_its_way() -> None:
    made, mover, images = ring([10] * 4, ahead=1)
    for block in range(4):
        run(made, block, images)
    assert mover.filled[-1] == "0"


def test_another_order_is_learned() -> None:
    made, _, images = ring([10] * 6)
    order = [5, 3, 1, 0, 2, 4]
    for block in order * 2:
        run(made, block, images)
    late = made.late
    for block in order * 5:
        run(made, block, images)
    assert made.late == late


@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_order_is_right(ahead: int, count: int) -> None:
    """Skipped blocks, blocks that run twice or within each other, failures: never another block's bytes."""
    chance = random.Random(ahead * 10 + count)
    sizes = [chance.choice([16, 32, 100]) for _ in range(count)]
    made, mover, images = ring(sizes, ahead)
    for _ in range(400):
        block = chance.randrange(count)
        mover.broken = {str(chance.randrange(count))} if chance.random() < 0.1 else set()
        try:
            seen = made.enter(block)
        except BlockReadError:
            continue
        if chance.random() < 0.2:
            inner = chance.randrange(count)
            try:
                assert torch.equal(made.enter(inner), images[inner])
                made.leave(inner)
            except BlockReadError:
                pass
        assert torch.equal(seen, images[block])
        made.leave(block)
    assert made.nbytes == sum(slot_sizes(sizes, ahead))


def test_a_failure_is_tried_again() -> None:
    made, mover, images = ring([10] * 4)
    mover.broken = {"1"}
    run(made, 0, images)
    for _ in range(2):
        with pytest.raises(BlockReadError, match="1 is broken"):
            made.enter(1)
    run(made, 2, images)
    mover.broken = set()
    run(made, 1, images)


def test_changes_are_counted() -> None:
    """Whoever keeps a tensor of a block sees that its memory was written to."""
    made, _, _ = ring([10] * 4, ahead=0)
    view = made.enter(0)[2:4]
    version = view._version
    made.leave(0)
    made.enter(1)
    assert view._version > version


def test_a_large_block_gets_one_large_slot() -> None:
    assert slot_sizes([3, 9, 3, 3], 2) == [9, 3, 3]
    assert slot_sizes([1000, 999, 1100, 500], 2) == [1100, 1100, 1100]
    assert slot_sizes([5], 2) == [5]
    made, mover, images = ring([3, 3, 3, 9, 3, 3])
    for _ in range(4):
        for block in range(6):
            run(made, block, images)
    assert mover.allocated == made.nbytes == 15
