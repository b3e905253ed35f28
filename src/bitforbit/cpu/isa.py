"""Which instruction set the native kernels use: the best that this CPU has, unless forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from bitforbit.cpu import _native
from bitforbit.errors import UnknownIsaError

_forced: str | None = None


def implementations() -> dict[str, bool]:
    """All implementations compiled in, best last, each with whether this CPU can run it."""
    return dict(_native_implementations())


@cache
def _native_implementations() -> list[tuple[str, bool]]:
    return _native.implementations()


def active() -> str:
    """Name of the implementation in use: forced by :func:`force`, else ``BITFORBIT_ISA``, else the best supported.

    Raises UnknownIsaError if the name is unknown or this CPU cannot run it.
    """
    name = _forced or os.environ.get("BITFORBIT_ISA", "")
    known = implementations()
    supported = [candidate for candidate, usable in known.items() if usable]
    if not name:
        return supported[-1]
    if name not in supported:
        reason = "this CPU lacks it" if name in known else "it is unknown"
        raise UnknownIsaError(
            f"expected an instruction set among {', '.join(supported)}, got {name!r} ({reason}); change BITFORBIT_ISA"
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
