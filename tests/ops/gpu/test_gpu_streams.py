"""What is said to torch's streams and events, with stand-ins for those: no GPU is needed to see a wrong order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_streams import Clock, Queue, RaceError, Simulation, merge
from test_gpu_prefetch import POLICIES, play

from bitforbit.ops.gpu import queues, runtime, status
from bitforbit.ops.gpu.streams import CudaStreams, OneStream
from cuda_shim.emulation import EmulatedLauncher, EmulatedQueue

CUDA = torch.device("cuda", 0)


class Stream:
    """With the methods of torch.cuda.Stream that are used."""

    def __init__(self, queue: Queue, handle: int) -> None:
        self.queue = queue
        self.cuda_stream = handle

    def wait_event(self, event: Event) -> None:
        assert event.clock is not None, "waiting for an event that was never recorded has no effect"
        merge(self.queue.clock, event.clock)


class Event:
    """With the methods of torch.cuda.Event that are used."""

    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.clock: Clock | None = None

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.queue.clock)


class OnSimulation(CudaStreams):
    """Works on the simulation, by the same calls as on a GPU."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        main, side = Stream(simulation.main, 1), Stream(simulation.side, 2)
        super().__init__(CUDA, main, side, simulation.capturing)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return self.simulation.empty(shape, dtype)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Simulation:
    found = Simulation(pace=0, capturing=request.param)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(queues, "cuda_queue", lambda device, stream: {1: found.main, 2: found.side}[stream])
    return found


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("simulation", [False, True], indirect=True, ids=["eager", "captured"])
def test_events_order_all_work(simulation, name):
    Event.made = 0
    play(simulation, POLICIES[name], 3, OnSimulation(simulation))
    assert Event.made <= 2 + POLICIES[name].ahead  # they are used again


@pytest.mark.parametrize("simulation", [False], indirect=True)
@pytest.mark.parametrize("method", ["fork", "follow", "join"])
def test_each_call_matters(simulation, method, monkeypatch):
    streams = OnSimulation(simulation)
    streams.fork()  # an event that was recorded, but too early
    monkeypatch.setattr(streams, method, lambda *_: None)
    with pytest.raises(RaceError):
        play(simulation, POLICIES["default"], 3, streams)


def test_each_capture_has_a_schedule_of_its_own(monkeypatch):
    """And that of eager work goes on where it was."""
    state: dict[str, Any] = {"capture": 0, "stream": 7}

    class Current:
        @property
        def cuda_stream(self) -> int:
            return state["stream"]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    monkeypatch.setattr(queues, "capture_id", lambda device, stream: state["capture"])
    queue = queues.EmulatedTorchQueue(EmulatedQueue(EmulatedLauncher()))
    monkeypatch.setattr(runtime, "_cuda_streams", lambda device, stream, capturing: OneStream(queue))
    word = status.of(torch.device("cpu"))

    def current(stream: int = 7, capture: int = 0) -> Any:
        state.update(stream=stream, capture=capture)
        return runtime._prefetcher(CUDA, word)

    try:
        eager = current()
        assert current() is eager
        other = current(stream=8)
        assert other is not eager
        captured = current(capture=5)
        assert captured not in (eager, other)
        assert current(capture=5) is captured
        assert current() is eager
        again = current(capture=6)
        assert again is not captured
        assert current(stream=8) is other
        assert current() is eager
        with runtime.use_policy(POLICIES["two ahead"]):
            assert current() is not eager
    finally:
        runtime.clear()
