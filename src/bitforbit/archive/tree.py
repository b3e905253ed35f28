"""A tree of files that becomes the destination once it is whole: what one run and the parts of a run have in common."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from bitforbit.archive.filesystem import exists, free_bytes, tree_bytes
from bitforbit.errors import DestinationExistsError, DiskFullError

WRITE_BUFFER_BYTES = 1 << 20

HOPELESS_RATIO = 0.25
"""No model is expected to shrink below this share of its size; less free space is refused before writing."""


class GrowingTree(ABC):
    """Files below ``path / ... / tree``, beside the destination ``dst``. Methods may be called from several threads.

    ``finished`` maps the paths that are on disk to what a later run needs to know of them.
    """

    suffix: ClassVar[str]
    continue_hint: ClassVar[str]
    """How to go on after a full disk."""

    def __init__(self, dst: Path, needed_bytes: int, *, overwrite: bool) -> None:
        """``needed_bytes`` estimates what will be written. Creates nothing."""
        self.dst = dst.resolve()
        self.path = self.dst.with_name(self.dst.name + self.suffix)
        self.tree = self.path / "tree"
        self.finished: dict[str, Any] = {}
        self._needed_bytes = needed_bytes
        self._overwrite = overwrite

    def _restore_interrupted_swap(self) -> None:
        old = self.path / "old"
        if old.exists() and not os.path.lexists(self.dst):
            old.rename(self.dst)

    def _check_destination(self) -> None:
        dst = self.dst
        if not self._overwrite and exists(dst):
            raise DestinationExistsError(f"{dst}: exists already; choose another place, or overwrite it on purpose")

    def _check_space(self, minimum_bytes: int, free: int) -> None:
        if free < minimum_bytes:
            raise DiskFullError(
                f"{self.dst}: about {self._needed_bytes} bytes are needed, {free} are free; free some space or "
                "choose another place. Nothing was written"
            )

    @abstractmethod
    def is_finished(self, path: str) -> bool:
        """Whether a file is on disk already."""

    @abstractmethod
    def record(self, path: str, stored_size: int, entry: object) -> None:
        """Note that the file of the tree is finished; ``entry`` is what a later run needs to know of it."""

    @abstractmethod
    def _temporary(self, path: str) -> Path:
        """Where a file is written before it gets its name."""

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """A file of the tree, open for writing and reading; on disk under its name once the block ends well."""
        with self._create(self._temporary(path), self.tree / path) as file:
            yield file

    @contextmanager
    def _create(self, temporary: Path, final: Path) -> Iterator[BinaryIO]:
        try:
            with self._open(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                self._rename(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _open(self, temporary: Path) -> BinaryIO:
        return temporary.open("wb+", buffering=WRITE_BUFFER_BYTES)

    def _rename(self, temporary: Path, final: Path) -> None:
        temporary.rename(final)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn a full disk into DiskFullError with what is free and what is needed."""
        try:
            yield
        except OSError as e:
            if isinstance(e, DiskFullError) or e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            missing = max(0, self._needed_bytes - tree_bytes(self.tree))
            raise DiskFullError(
                f"disk full while writing {what} for {self.dst}: {free_bytes(self.path.parent)} bytes are free, "
                f"about {missing} more are needed. Finished files are kept in {self.path}: free "
                f"some space and {self.continue_hint}, or delete that directory"
            ) from e
