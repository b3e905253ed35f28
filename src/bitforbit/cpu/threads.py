"""How many threads the kernels use."""

from __future__ import annotations

import os

from bitforbit.errors import UsageError


def default_threads() -> int:
    """``BITFORBIT_THREADS`` if set, else the number of CPUs this process may use."""
    value = os.environ.get("BITFORBIT_THREADS", "")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UsageError(f"expected BITFORBIT_THREADS to be a positive number, got {value!r}")
    return int(value)
