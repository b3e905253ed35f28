"""Levels of memory of known devices and of this CPU: sizes, and bandwidths where the maker publishes them.

Sources: NVIDIA's datasheets of H100 SXM, H200 SXM, A100 80GB SXM, and the Ada whitepaper (memory, its bandwidth, number
of multiprocessors); NVIDIA's tuning guides for Ampere, Ada and Hopper (registers, shared memory per block, L2). NVIDIA
publishes no bandwidth for L2 and shared memory. The CPU's caches are what Linux reports; their bandwidth is unknown
until it is measured (:meth:`Machine.with_bandwidths`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bitforbit.cpu.caches import data_caches
from bitforbit.errors import IoModelError

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8": 1}
"""Bytes of a word by dtype."""

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Level:
    """One level of memory.

    ``nbytes`` of one unit, of which the device has ``units``; ``bandwidth`` in bytes per second, all units together,
    None if unknown; ``cache``: it keeps what was used before without being told, from one kernel to the next.
    """

    name: str
    nbytes: int
    units: int = 1
    bandwidth: float | None = None
    cache: bool = True


@dataclass(frozen=True)
class Machine:
    """A device: its levels, closest to the arithmetic first; ``fast`` is the one that holds attention's tiles."""

    name: str
    levels: tuple[Level, ...]
    fast: str

    def level(self, name: str) -> Level:
        """The level of that name, in any case. Raises IoModelError."""
        for level in self.levels:
            if level.name.lower() == name.lower():
                return level
        names = ", ".join(level.name for level in self.levels)
        raise IoModelError(f"{self.name}: expected a level of memory among {names}, got {name!r}")

    def fast_words(self, dtype: str, level: str | None = None) -> int:
        """Words of one unit of the fast level, or of another: M. Raises IoModelError."""
        if dtype not in ITEM_BYTES:
            raise IoModelError(f"expected a dtype among {', '.join(ITEM_BYTES)}, got {dtype!r}")
        return self.level(level or self.fast).nbytes // ITEM_BYTES[dtype]

    def with_bandwidths(self, bandwidths: Mapping[str, float]) -> Machine:
        """The same machine with measured bandwidths, in bytes per second, by level. Raises IoModelError."""
        new = {self.level(name).name: value for name, value in bandwidths.items()}
        return replace(
            self, levels=tuple(replace(level, bandwidth=new.get(level.name, level.bandwidth)) for level in self.levels)
        )


def _gpu(name: str, units: int, shared_kib: int, l2_mib: int, memory: int, bandwidth: float) -> Machine:
    """A GPU of ``units`` multiprocessors. ``shared_kib``: what one block may use; ``bandwidth``: bytes per second."""
    return Machine(
        name,
        (
            Level("registers", 256 * _KIB, units, cache=False),
            Level("SMEM", shared_kib * _KIB, units, cache=False),
            Level("L2", l2_mib * _MIB),
            Level("HBM" if name != "RTX 4090" else "GDDR", memory, bandwidth=bandwidth),
        ),
        "SMEM",
    )


GPUS = (
    _gpu("H100", 132, 227, 50, 80 * 10**9, 3.35e12),
    _gpu("H200", 132, 227, 50, 141 * 10**9, 4.8e12),
    _gpu("A100", 108, 163, 40, 80 * 10**9, 2.039e12),
    _gpu("RTX 4090", 128, 99, 72, 24 * 10**9, 1.008e12),
)


def this_cpu() -> Machine:
    """The CPU at hand: its data caches and its memory."""
    cpus = os.cpu_count() or 1
    caches = [
        Level(f"L{cache.level}", cache.nbytes, max(1, cpus // max(1, cache.shared_by))) for cache in data_caches()
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    levels = (*caches, Level("DRAM", memory))
    return Machine("CPU", levels, levels[0].name)


def device_names() -> list[str]:
    """Names that :func:`find_machine` knows."""
    return [*(gpu.name for gpu in GPUS), "CPU"]


def find_machine(name: str) -> Machine:
    """A device by name, whatever the case and spaces. Raises IoModelError."""
    wanted = _plain(name)
    for gpu in GPUS:
        if _plain(gpu.name) == wanted:
            return gpu
    if wanted == "cpu":
        return this_cpu()
    raise IoModelError(f"expected a device among {', '.join(device_names())}, got {name!r}")


def find_fast_level(text: str) -> tuple[Machine, Level]:
    """A device and the level that is to hold tiles: "H100", or "CPU:L2" for another level than usual."""
    name, _, level = text.partition(":")
    machine = find_machine(name)
    return machine, machine.level(level or machine.fast)


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("-", "").replace("_", "")
