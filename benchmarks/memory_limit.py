"""A limit on the memory of a process and of the page cache it fills: a memory cgroup of its own, versions 1 and 2.

Without the right to make one there is no limit; what a process takes is then measured only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
"""Version 1's place, and version 2's."""
_LIMITS = ("memory.limit_in_bytes", "memory.max")
_SWAP = ("memory.memsw.limit_in_bytes", "memory.swap.max")
_PEAKS = ("memory.max_usage_in_bytes", "memory.peak")


@dataclass(frozen=True)
class Group:
    """A cgroup; ``path`` None: there is none, and nothing is limited."""

    path: Path | None

    def join(self) -> None:
        """Put this process into it. Memory that it has already is not counted."""
        if self.path is not None:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """Most memory in use so far, the page cache included."""
        return None if self.path is None else _number(self.path, _PEAKS)


@contextlib.contextmanager
def limited(nbytes: int | None) -> Iterator[Group]:
    """A new group that may have so much memory, None: as much as there is; removed in the end."""
    path = _make(nbytes)
    try:
        yield Group(path)
    finally:
        if path is not None:
            _remove(path)


def possible() -> bool:
    """Whether a limit can be set here."""
    with limited(1 << 30) as group:
        return group.path is not None


def forget(paths: list[Path]) -> None:
    """Take files out of the page cache, so that reading them reads the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not yet written stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _make(nbytes: int | None) -> Path | None:
    for root in ROOTS:
        path = root / f"bitforbit-benchmark-{os.getpid()}-{time.monotonic_ns()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            # The files appear with the directory. Where they do not, this is no memory cgroup.
            limit = next(path / name for name in _LIMITS if (path / name).exists())
            if nbytes is not None:
                limit.write_text(str(nbytes))
                for name in _SWAP:
                    with contextlib.suppress(OSError):  # no swap, or not accounted
                        (path / name).write_text("0" if name == "memory.swap.max" else str(nbytes))
            return path
        except (StopIteration, OSError):
            path.rmdir()
    return None


def _remove(path: Path) -> None:
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError:  # a process that was killed is still leaving
            time.sleep(0.05)


def _number(path: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((path / name).read_text())
    return None
