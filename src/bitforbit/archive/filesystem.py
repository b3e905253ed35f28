"""Small questions to the file system, and the two durable things it can do: sync and swap."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def exists(path: Path) -> bool:
    """Whether something is there; an empty directory does not count."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the file system."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def tree_bytes(root: Path) -> int:
    """Bytes of all files below a directory; a file that goes away meanwhile counts as none."""
    total = 0
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Make the names in a directory and all below it durable."""
    for directory, _, _ in os.walk(root):
        sync_directory(Path(directory))


def sync_files(root: Path) -> None:
    """Make the contents of all files below a directory durable."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    return result == 0


def replace(new: Path, old: Path, aside: Path) -> None:
    """Give ``new`` the name ``old``, for good; what had that name goes to ``new``, or to ``aside`` without exchange.

    One step, except for a directory that is replaced where the system cannot swap names.
    """
    if not os.path.lexists(old):
        new.rename(old)
    elif not exchange(new, old):
        old.rename(aside)
        new.rename(old)
    sync_directory(old.parent)
