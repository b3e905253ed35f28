"""Where results grow until they are whole: durable, resumable, published by one rename.

``<dst>.bitforbit-partial/`` holds ``tree/`` (what becomes the destination) and ``journal.jsonl``: a header line with
the options and the stamps of the source files, then one line per finished file. A file counts as finished once it
is on disk (fsync), has its final name, and its line is on disk too; a torn last line counts as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitforbit import __version__
from bitforbit.archive.filesystem import exists, free_bytes, replace, sync_tree
from bitforbit.archive.tree import GrowingTree
from bitforbit.errors import BitforbitError, DestinationExistsError, DiskFullError, ResumeError, UsageError

PARTIAL_SUFFIX = ".bitforbit-partial"
_TEMPORARY_SUFFIX = ".bitforbit-tmp"


@dataclass(frozen=True)
class Plan:
    """What a run is going to do; a resumed run must agree in everything.

    options is JSON-able; stamps are (size in bytes, mtime in nanoseconds) of the source files; needed_bytes estimates
    what will be written, minimum_bytes is what surely will.
    """

    operation: str
    source: Path
    options: Mapping[str, object]
    stamps: Mapping[str, tuple[int, int]]
    needed_bytes: int
    minimum_bytes: int

    def header(self) -> dict[str, object]:
        """First line of the journal."""
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode("utf-8")).hexdigest()
        return {
            "operation": self.operation,
            "writer": __version__,
            "source": str(self.source.resolve()),
            "options": digest,
            "files": {path: list(stamp) for path, stamp in self.stamps.items()},
        }


class Staging(GrowingTree):
    """One run's staging directory. Methods may be called from several threads."""

    suffix = PARTIAL_SUFFIX
    continue_hint = "run again with resume (--resume)"

    def __init__(self, dst: Path, plan: Plan, *, overwrite: bool, resume: bool) -> None:
        """Create it, or continue it if ``resume``.

        Raises DestinationExistsError, ResumeError, DiskFullError, and UsageError if another run is using it.
        """
        super().__init__(dst, plan.needed_bytes, overwrite=overwrite)
        self._plan = plan
        self._journal_path = self.path / "journal.jsonl"
        self._lock = threading.Lock()
        self._restore_interrupted_swap()
        self._check_destination()
        self.dst.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._open_locked()
        try:
            if resume and self._journal_path.exists():
                self._read_journal()
            else:
                shutil.rmtree(self.tree, ignore_errors=True)
                self._clear_except_tree()
                free = free_bytes(self.path)
                if free < plan.minimum_bytes:
                    self.path.rmdir()
                self._check_space(plan.minimum_bytes, free)
                self.tree.mkdir()
                with self.guard("the journal"):
                    self._append(plan.header())
        except BaseException:
            os.close(self._fd)
            raise

    def _open_locked(self) -> int:
        self.path.mkdir(exist_ok=True)
        if self.path.is_symlink():  # what is in the staging directory is deleted
            raise UsageError(f"{self.path}: expected a directory of an unfinished run, got a symbolic link; remove it")
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(f"{self.path}: another run is writing {self.dst}; wait until it has finished") from None
        return fd

    def _clear_except_tree(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    # --- the journal ---------------------------------------------------------------------------------------------

    def _append(self, line: Mapping[str, object]) -> None:
        with self._journal_path.open("ab") as file:
            file.write(json.dumps(line).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self) -> None:
        data = self._journal_path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            header = lines.pop(0)
        except (ValueError, IndexError):
            raise ResumeError(f"{self._journal_path}: damaged; run again without resuming") from None
        for key, value in self._plan.header().items():
            if header.get(key) != value:
                raise ResumeError(f"{self.path}: {self._difference(key, header.get(key))}; run again without resuming")
        os.truncate(self._journal_path, len(whole))
        for line in lines:
            path = self.tree / line["path"]
            if path.is_file() and path.stat().st_size == line["stored_size"]:
                self.finished[line["path"]] = line["entry"]

    def _difference(self, key: str, before: object) -> str:
        if key == "files" and isinstance(before, dict):
            for path in sorted(self._plan.stamps.keys() | before.keys()):
                stamp = self._plan.stamps.get(path)
                if stamp is None or before.get(path) != list(stamp):
                    return f"source file {path!r} is not as it was when the unfinished run began"
        return f"the unfinished run had another {key} ({before!s:.80})"

    def record(self, path: str, stored_size: int, entry: object) -> None:
        """See :class:`GrowingTree`."""
        with self._lock:
            self._append({"path": path, "stored_size": stored_size, "entry": entry})
            self.finished[path] = entry

    # --- files ---------------------------------------------------------------------------------------------------

    def is_finished(self, path: str) -> bool:
        """See :class:`GrowingTree`."""
        return path in self.finished

    def _temporary(self, path: str) -> Path:
        final = self.tree / path
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(hashlib.sha256(final.name.encode()).hexdigest()[:16] + _TEMPORARY_SUFFIX)

    # --- the end -------------------------------------------------------------------------------------------------

    def publish(self, single: str | None = None) -> None:
        """Make the tree, or its one file ``single``, the destination, atomically.

        Raises DestinationExistsError if something has appeared there and ``overwrite`` was not given.
        """
        result = self.tree if single is None else self.tree / single
        sync_tree(self.tree)
        if not self._overwrite and exists(self.dst):
            raise DestinationExistsError(f"{self.dst}: appeared while this run was writing; move it, then resume")
        self._journal_path.unlink()  # from here on the tree may hold the old destination: never resume from it
        replace(result, self.dst, self.path / "old")
        self.discard()

    def discard(self) -> None:
        """Remove everything staged."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self, error: BaseException | None) -> None:
        """End of the run: staged files stay if the run can be resumed after ``error``."""
        os.close(self._fd)
        resumable = DiskFullError | ResumeError | DestinationExistsError
        if isinstance(error, BitforbitError) and not isinstance(error, resumable):
            self.discard()


@contextmanager
def staged(dst: Path, plan: Plan, *, overwrite: bool, resume: bool) -> Iterator[Staging]:
    """A staging directory for the duration of a run: kept after an interruption, removed after a refusal."""
    staging = Staging(dst, plan, overwrite=overwrite, resume=resume)
    error: BaseException | None = None
    try:
        with staging.guard("files"):
            yield staging
    except BaseException as e:
        error = e
        raise
    finally:
        staging.close(error)
