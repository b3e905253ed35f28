"""The progress bar: bytes done, bytes per second, time left. On standard error, and on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from bitforbit.archive import Progress


class Bar:
    """A bitforbit.archive.Progress that draws a bar, one phase after the other."""

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._task: TaskID | None = None

    def start(self, total_bytes: int, description: str) -> None:
        """A phase of ``total_bytes`` bytes begins; it takes the place of the one before."""
        self.finish()
        self._task = self._display.add_task(description, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        """That many more bytes are done."""
        if self._task is not None:
            self._display.advance(self._task, nbytes)

    def finish(self) -> None:
        """The phase is over."""
        if self._task is not None:
            self._display.remove_task(self._task)
            self._task = None


@contextmanager
def progress_bar(*, silent: bool) -> Iterator[Progress | None]:
    """A bar for the ``with`` block; None, which draws nothing, if ``silent`` or if standard error is no terminal."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as display:
        yield Bar(display)
