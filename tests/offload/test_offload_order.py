"""The order of copies and work on a GPU's streams, with stand-ins for torch's streams and events that keep clocks.

A clock says of every stream how much of its work is known to have ended. Whoever writes to a slot must know all that
has read it, and whoever reads must know the last writes: that they cannot meet is seen without their racing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitforbit.offload import movers, stores, stream_blocks
from offload import cases
from torch_helpers import assert_same_bits

Clock = dict[int, int]


class Streams:
    """What torch knows of streams, in this test."""

    def __init__(self) -> None:
        self.count = 0
        self.local = threading.local()
        self.default = Stream(self)
        self.reads: dict[int, list[tuple[int, int]]] = {}
        """Address of a slot -> stream and time of the work that has read it since it was written."""
        self.writes: dict[int, list[tuple[int, int]]] = {}
        self.slots: dict[int, int] = {}
        self.lock = threading.Lock()

    @property
    def current(self) -> Stream:
        return getattr(self.local, "stream", self.default)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.local.stream = self.current, stream
        yield
        self.local.stream = before

    def slot_of(self, tensor: torch.Tensor) -> int | None:
        at = tensor.data_ptr()
        return next((begin for begin, nbytes in self.slots.items() if begin <= at < begin + nbytes), None)

    def write(self, tensor: torch.Tensor) -> None:
        slot = self.slot_of(tensor)
        if slot is None:
            return
        with self.lock:
            stream = self.current
            assert stream is not self.default, "a copy beside the side stream"
            for reader, time in self.reads.pop(slot, []):
                assert stream.clock.get(reader, -1) >= time, "a slot is written to that is still being read"
                self.writes[slot] = []
            self.writes.setdefault(slot, []).append((stream.number, stream.tick()))

    def read(self, tensor: torch.Tensor) -> None:
        slot = self.slot_of(tensor)
        assert slot is not None
        with self.lock:
            stream = self.current
            assert self.writes[slot]
            for writer, time in self.writes[slot]:
                assert stream.clock.get(writer, -1) >= time, "a slot is read that is still being written to"
            self.reads.setdefault(slot, []).append((stream.number, stream.tick()))


class Stream:
    def __init__(self, streams: Streams, *args: Any) -> None:
        streams.count += 1
        self.number = self.cuda_stream = streams.count
        self.clock: Clock = {self.number: 0}

    def tick(self) -> int:
        self.clock[self.number] += 1
        return self.clock[self.number]

    def wait_event(self, event: Event) -> None:
        assert event.clock is not None, "an event that was never recorded orders nothing"
        for number, time in event.clock.items():
            self.clock[number] = max(time, self.clock.get(number, -1))

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self) -> None:
        self.clock: Clock | None = None

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        assert self.clock is not None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    real_copy = torch.Tensor.copy_

    def copy(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.write(self)
        return real_copy(self, *args, **kwargs)

    def empty(self: Any, nbytes: int) -> torch.Tensor:
        memory = real_empty(self, nbytes)
        made.slots[memory.data_ptr()] = nbytes
        return memory

    monkeypatch.setattr(torch.cuda, "Stream", lambda *args: Stream(made, *args))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    real_empty = movers.CudaMover.empty
    monkeypatch.setattr(movers.CudaMover, "empty", empty)
    monkeypatch.setattr(movers.pinned, "empty", lambda nbytes, *args: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr("bitforbit.offload.stream.mover_for", lambda device: movers.CudaMover(device))
    monkeypatch.setattr(stores, "CHUNK_BYTES", 5000)
    return made


@torch.no_grad()
@pytest.mark.parametrize("in_files", [0, 1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_order(in_files: int, ahead: int, streams: Streams, tmp_path: Path) -> None:
    """Blocks in host memory and in files, in any order, on several streams, some of which fail."""
    chance = random.Random(ahead)
    plain = cases.model(6)
    made = cases.compressed(plain)
    stored: dict[str, Any] = {}
    if in_files:
        files = cases.to_files(cases.compressed(plain), tmp_path, 6)
        for number in range(0, 6, in_files):
            block = made.blocks[number]
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            stored |= {name: place for name, place in files.items() if name.startswith(f"blocks.{number}.")}
    stream = stream_blocks(made.named(), "cpu", ahead=ahead, stored=stored)
    for block in made.blocks:
        block.out.register_forward_hook(lambda module, args, out: streams.read(next(iter(module.parameters()))))
    side_streams = [streams.default, Stream(streams), Stream(streams)]
    for seed in range(40):
        plain.order = made.order = (
            list(range(6)) if seed % 2 else [chance.randrange(6) for _ in range(chance.randrange(8))]
        )
        with streams.use(chance.choice(side_streams)):
            x = cases.inputs(seed=seed)
            assert_same_bits(made(x), plain(x))
    assert stream.fetched[0] > 40
