"""Resident memory of this process, from Linux's /proc; None elsewhere."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")


def peak_bytes() -> int | None:
    """Largest resident size so far, or since :func:`reset_peak` (VmHWM). Not ru_maxrss, which a child inherits."""
    return _kilobytes(_STATUS, "VmHWM")


def resident_bytes() -> int | None:
    """Resident size now (VmRSS), mapped files included."""
    return _kilobytes(_STATUS, "VmRSS")


def available_bytes() -> int | None:
    """What the machine can still give without swapping (MemAvailable)."""
    return _kilobytes(_MEMINFO, "MemAvailable")


def reset_peak() -> bool:
    """Begin the peak anew at the present size; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
