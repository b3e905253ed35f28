"""How many threads the kernels use, and whose."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from bitforbit.cpu import _native
from bitforbit.errors import UsageError

_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[^/]*$")


def default_threads() -> int:
    """``BITFORBIT_THREADS`` if set, else the number of CPUs this process may use."""
    value = os.environ.get("BITFORBIT_THREADS", "")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UsageError(f"expected BITFORBIT_THREADS to be a positive number, got {value!r}")
    return int(value)


def share_openmp_threads(prefer: str = "") -> str:
    """Take the kernels' threads from the OpenMP runtime that this process has loaded already, if any.

    OpenMP's idle threads spin for a while: kernels between the products of a framework that uses them would wait
    for the cores. ``prefer`` is a folder whose runtime is taken if several are loaded. Returns the path of the
    runtime, or "" if there is none; the kernels then keep starting threads of their own.
    """
    for path in sorted(_loaded_libraries(), key=lambda path: not path.startswith(prefer)):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue  # unloaded meanwhile, or a runtime without GCC's interface
        if address:
            _native.use_parallel_region(address)
            return path
    return ""


def own_threads() -> None:
    """Undo :func:`share_openmp_threads`."""
    _native.use_parallel_region(0)


def _loaded_libraries() -> set[str]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if _OPENMP.search(line)}
