"""Resident memory of this process, from Linux's /proc, None elsewhere; GPU memory, as torch counts it."""

from __future__ import annotations

import ctypes
import sys
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


def give_back_freed() -> None:
    """Let the C library return freed memory to the system, so that the next growth is seen; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def gpu_peak_bytes() -> int | None:
    """Largest memory of tensors on all GPUs so far, or since :func:`reset_gpu_peak`; None if no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return sum(int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count()))


def gpu_available_bytes() -> int:
    """What all GPUs together can still give; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))


def reset_gpu_peak() -> None:
    """Begin the GPUs' peaks anew at what is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


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
