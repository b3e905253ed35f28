"""What the benchmarks on a GPU share: timing by CUDA events over graphs, facts of the device, and a dry run.

The dry run goes through the same code on the CPU, with the kernels emulated and tiny sizes. It checks results and
measures nothing: where a figure would stand is None.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional

from benchmarks.common import ROOT, machine

Call = Callable[[], object]
T = TypeVar("T")

L2_MULTIPLE = 4
"""Data of all rotated calls together, in sizes of the L2 cache: what a call leaves there is gone by its next turn."""
MAX_ROTATIONS = 64


@dataclass
class Graph:
    """A CUDA graph of several calls."""

    calls: int
    graph: Any
    kept: list[object]
    """Their results."""


class Meter:
    """Measures on a CUDA device."""

    measures = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def rotations(self, nbytes: int) -> int:
        """How many copies of a call's data to take turns with."""
        return max(2, min(MAX_ROTATIONS, -(-L2_MULTIPLE * self.l2_bytes // max(1, nbytes))))

    def microseconds(self, calls: Sequence[Call], rounds: int = 15) -> float | None:
        """Median time of one call: all of them captured in one graph, which is replayed between two events."""
        graph = self.capture(calls)
        times = self._between_events(graph.graph.replay, rounds)
        return 1000 * statistics.median(times) / graph.calls

    def capture(self, calls: Sequence[Call]) -> Graph:
        """All of the calls, in one graph."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # so that each call has an output of its own
        graph.replay()
        torch.cuda.synchronize()
        return Graph(len(calls), graph, kept)

    def in_turns(self, graphs: Mapping[str, Graph], rounds: int = 15) -> dict[str, list[float]]:
        """Microseconds of one call, by graph and round. The graphs take turns, so that a drift hits them all."""
        marks = []
        for number in range(rounds + 1):
            for name, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.graph.replay()
                end.record()
                if number:  # the first round warms up, and gives the host a lead: no launch is waited for later
                    marks.append((name, begin, end))
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in graphs}
        for name, begin, end in marks:
            found[name].append(1000 * begin.elapsed_time(end) / graphs[name].calls)
        return found

    def eager_microseconds(self, call: Call, rounds: int = 5) -> float | None:
        """Median time of a call that no graph can hold (it allocates, or waits), its work on the device included."""
        call()
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return 1e6 * statistics.median(times)

    def _between_events(self, call: Call, rounds: int) -> list[float]:
        """Milliseconds of each round."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


class DryMeter(Meter):
    """Calls and measures nothing."""

    measures = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 0

    def rotations(self, nbytes: int) -> int:
        """Two: enough to go through the code."""
        return 2

    def microseconds(self, calls: Sequence[Call], rounds: int = 15) -> float | None:
        """None."""
        for call in calls:
            call()
        return None

    def capture(self, calls: Sequence[Call]) -> Graph:
        """Calls them once, all the same."""
        return Graph(len(calls), None, [call() for call in calls])

    def in_turns(self, graphs: Mapping[str, Graph], rounds: int = 15) -> dict[str, list[float]]:
        """No rounds."""
        return {name: [] for name in graphs}

    def eager_microseconds(self, call: Call, rounds: int = 5) -> float | None:
        """None."""
        call()
        return None


@contextlib.contextmanager
def meter(dry_run: bool) -> Iterator[Meter]:
    """The meter to use; in a dry run the emulation stands for the GPU as long as this lasts."""
    if not dry_run:
        if not torch.cuda.is_available():
            raise SystemExit("expected a GPU that torch can use, found none; --dry-run goes through the code on a CPU")
        yield Meter()
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from bitforbit.ops import gpu
    from bitforbit.ops.gpu import proofs
    from cuda_shim.emulation import EmulatedQueue

    with gpu.emulate(EmulatedQueue()), proofs.examine(functional.linear):
        yield DryMeter()


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def per_second(nbytes: int, microseconds: float | None) -> float | None:
    """GB/s."""
    return None if microseconds is None else nbytes / microseconds / 1e3


def same_bits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The gate of every figure. Raises AssertionError that names the first difference."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}"
        )
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    differing = got.contiguous().view(integer) != expected.contiguous().view(integer)
    if bool(differing.any()):
        first = int(differing.flatten().nonzero()[0])
        raise AssertionError(f"{what}: {int(differing.sum())} elements differ, the first at {first}")


def facts(dry_run: bool = False) -> dict[str, Any]:
    """Machine, versions and commit, and the GPU's own."""
    result: dict[str, Any] = {"machine": machine()}
    if not dry_run:
        from bitforbit.cuda import device

        properties, status = device.require(0), device.status()
        result["device"] = {
            "name": properties.name,
            "compute_capability": "{}.{}".format(*properties.compute_capability),
            "multiprocessors": properties.multiprocessors,
            "l2_bytes": properties.l2_bytes,
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "driver_cuda": status.driver,
            "nvrtc": status.nvrtc,
            "torch_cuda": torch.version.cuda,
        }
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks on a GPU have."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--dry-run", action="store_true", help="emulated on the CPU, tiny, without figures")
    options.add_argument("--json", type=Path, help="where the result goes")
    return options


class Report:
    """A benchmark's result, in its file as far as it has come. What fails is noted and does not stop the rest."""

    def __init__(self, file: Path | None) -> None:
        self.result: dict[str, Any] = {"errors": {}}
        self._file = file

    def put(self, **values: Any) -> None:
        """Add to the result."""
        self.result.update(values)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.result, indent=1) + "\n")

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """What the function returns; None, and an entry under "errors", if it raises."""
        try:
            return function()
        except Exception as error:  # noqa: BLE001  (a device is lent for minutes: the other figures still count)
            traceback.print_exc()
            self.result["errors"][what] = f"{type(error).__name__}: {error}"[:2000]
            self.put()
            return None

    def end(self) -> int:
        """The exit status."""
        for what, error in self.result["errors"].items():
            print(f"FAILED {what}: {error}")
        return 1 if self.result["errors"] else 0


def cell(value: float | None, form: str = ".1f") -> str:
    """A figure of a table."""
    return "not measured" if value is None else format(value, form)


if __name__ == "__main__":
    chosen = parser("Facts of machine and GPU").parse_args()
    Report(chosen.json).put(**facts(chosen.dry_run))
