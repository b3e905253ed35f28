"""How long operations tell their caller how far they are."""

from __future__ import annotations

import threading
from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one operation. The archive functions never call it from two threads at once."""

    def start(self, total_bytes: int, description: str) -> None:
        """A phase of ``total_bytes`` bytes begins."""
        ...

    def advance(self, nbytes: int) -> None:
        """That many more bytes are done."""
        ...

    def finish(self) -> None:
        """The phase is over, successfully or not."""
        ...


class NoProgress:
    """Says nothing."""

    def start(self, total_bytes: int, description: str) -> None:
        """See :class:`Progress`."""

    def advance(self, nbytes: int) -> None:
        """See :class:`Progress`."""

    def finish(self) -> None:
        """See :class:`Progress`."""


class LockedProgress:
    """Serialises the calls of several threads."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress: Progress = NoProgress() if progress is None else progress
        self._lock = threading.Lock()

    def start(self, total_bytes: int, description: str) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._progress.start(total_bytes, description)

    def advance(self, nbytes: int) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._progress.advance(nbytes)

    def finish(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._progress.finish()
