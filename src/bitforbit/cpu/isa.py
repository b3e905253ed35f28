"""Which instruction set the native kernels use: the best that this CPU has, unless forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bitforbit.cpu import _native
from bitforbit.errors import UnknownIsaError

_forced: str | None = None


_KNOWN = dict(_native.implementations())
_SUPPORTED = [name for name, usable in _KNOWN.items() if usable]


def implementations() -> dict[str, bool]:
    """All implementations compiled in, best last, each with whether this CPU can run it."""
    return dict(_KNOWN)


def active() -> str:
    """Name of the implementation in use: forced by :func:`force`, else ``BITFORBIT_ISA``, else the best supported.

    Raises UnknownIsaError if the name is unknown or this CPU cannot run it.
    """
    name = _forced or os.environ.get("BITFORBIT_ISA", "")
    if not name:
        return _SUPPORTED[-1]
    if name not in _SUPPORTED:
        reason = "this CPU lacks it" if name in _KNOWN else "it is unknown"
        raise UnknownIsaError(
            f"expected an instruction set among {', '.join(_SUPPORTED)}, got {name!r} ({reason}); change BITFORBIT_ISA"
        )
    return name


@contextmanager
def force(name: str) -> Iterator[None]:
    """Use one implementation within the ``with`` block (for tests and benchmarks; not per thread)."""
    global _forced
    previous, _forced = _forced, name
    try:
        active()
        yield
    finally:
        _forced = previous
