"""This CPU's data caches, as Linux reports them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_BYTES = {1: 32 << 10, 2: 1 << 20}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One level: its number (1 is the closest), bytes, and how many CPUs share it."""

    level: int
    nbytes: int
    shared_by: int


def data_caches(root: Path = _SYSFS) -> list[Cache]:
    """Data and unified caches of the first CPU, closest first; empty where the system does not say."""
    found = []
    for folder in root.glob("index*"):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind in ("Data", "Unified"):
                found.append(Cache(int(level), _bytes(size), _count(shared)))
        except (OSError, ValueError):
            continue  # a level that the system describes only in part
    return sorted(found, key=lambda cache: cache.level)


def level_bytes(level: int) -> int:
    """Size of the L1 or L2 data cache; 32 KiB or 1 MiB where the system does not say."""
    return next((cache.nbytes for cache in data_caches() if cache.level == level), _USUAL_BYTES[level])


def _bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)


def _count(cpus: str) -> int:
    """CPUs in a list such as "0-3,8"."""
    ranges = [part.split("-") for part in cpus.split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
