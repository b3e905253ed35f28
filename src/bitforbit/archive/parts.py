"""Where the parts of a compression grow, written by many machines that share a file system.

``<dst>.bitforbit-parts/`` holds ``plan.json`` (what all workers must agree in: version, settings, the source files'
sizes and times) and a directory named by the plan's digest, with ``tree/`` (what becomes the destination), ``done/``
(one receipt per finished file) and ``tmp/`` (files that are being written).

Nothing rests on locks between machines, which not every shared file system has. What makes it safe: the same plan
gives the same bytes, whoever writes them; a file is written under a name of its own and renamed when it is on disk;
its receipt follows in the same way. Two workers with the same file cost time, a dead one leaves a temporary file.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bitforbit import __version__
from bitforbit.archive.filesystem import free_bytes, replace, sync_directory, sync_tree
from bitforbit.archive.job import Settings
from bitforbit.archive.source import SourceTree
from bitforbit.archive.tree import GrowingTree
from bitforbit.errors import ManifestError, ResumeError, UsageError
from bitforbit.format.manifest import FileEntry

PARTS_SUFFIX = ".bitforbit-parts"


def plan_of(tree: SourceTree, settings: Settings) -> dict[str, Any]:
    """What the workers of one compression must agree in. JSON-able.

    Where the source lies is left out: machines may mount it in different places. A copy with the same sizes and times
    counts as the same source.
    """
    files = {path: list(stamp) for path, stamp in tree.stamps.items()}
    return {"writer": __version__, **settings.options(), "files": files, "directories": list(tree.directories)}


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of the parts in ``<dst>.bitforbit-parts``, None if there are none. Raises ResumeError."""
    try:
        plan = json.loads((path / "plan.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        plan = None
    globs = [plan.get("include"), plan.get("exclude")] if isinstance(plan, dict) else []
    if not isinstance(plan, dict) or not all(isinstance(g, list) and all(isinstance(s, str) for s in g) for g in globs):
        raise ResumeError(f"{path}: plan.json is damaged; delete that directory and begin anew")
    return plan


class Parts(GrowingTree):
    """The staging directory that all workers of one destination share."""

    suffix = PARTS_SUFFIX
    continue_hint = "run the same part again"

    def __init__(self, dst: Path, plan: Mapping[str, Any], needed_bytes: int, *, overwrite: bool) -> None:
        """Creates nothing; see :meth:`open`."""
        super().__init__(dst, needed_bytes, overwrite=overwrite)
        self._plan = plan
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode("ascii")).hexdigest()
        self._room = digest[:16]
        work = self.path / self._room
        self.tree, self._done, self._tmp = work / "tree", work / "done", work / "tmp"
        self._lock = threading.Lock()

    def open(self, minimum_bytes: int) -> None:
        """Join the other workers, or be the first one; see what is finished.

        Raises DestinationExistsError, DiskFullError, ResumeError if the parts that are there have another plan.
        """
        self._check_destination()
        self.dst.parent.mkdir(parents=True, exist_ok=True)
        if read_plan(self.path) is None:
            self._check_space(minimum_bytes, free_bytes(self.dst.parent))
            with self.guard("the plan"):
                self._found()
        self.check_plan()
        self.look()
        self._remove_remains()

    def _found(self) -> None:
        """Create the directory with all that is in it, in one step; nothing happens if another worker was faster."""
        new = self._beside()
        room = new / self._room
        for directory in (room / "done", room / "tmp", *(room / "tree" / d for d in self._directories())):
            directory.mkdir(parents=True, exist_ok=True)
        (new / "plan.json").write_text(json.dumps(self._plan), "ascii")
        fd = os.open(new / "plan.json", os.O_RDONLY)
        try:
            os.fsync(fd)
            new.rename(self.path)  # fails if there is a directory that is not empty
        except OSError:
            if not self.path.exists():
                raise
        finally:
            os.close(fd)
            shutil.rmtree(new, ignore_errors=True)
        sync_directory(self.path.parent)

    def _directories(self) -> Iterator[str]:
        yield "."
        yield from self._plan["directories"]
        yield from {path.rpartition("/")[0] for path in self._plan["files"] if "/" in path}

    def check_plan(self) -> None:
        """Raises ResumeError if there are no parts, or parts with another plan; these are left as they are."""
        before = read_plan(self.path)
        if before is None:
            raise ResumeError(f"{self.path}: expected parts of a compression, got none; compress them first (--shards)")
        for key in [*self._plan, *(before.keys() - self._plan.keys())]:
            if before.get(key) != self._plan.get(key):
                raise ResumeError(
                    f"{self.path}: {self._difference(key, before.get(key))}. All workers and the merge need the same "
                    "version, settings and source; finish those parts, or delete that directory and begin anew"
                )

    def _difference(self, key: str, before: object) -> str:
        now = self._plan.get(key)
        if key == "files" and isinstance(before, dict) and isinstance(now, dict):
            for path in sorted(now.keys() | before.keys()):
                if now.get(path) != before.get(path):
                    return (
                        f"source file {path!r} has [size, time in ns] {now.get(path)} here and {before.get(path)} in "
                        "the parts (copies keep their times with cp -p or rsync -a)"
                    )
        return f"expected {key} {before!s:.80} as in the parts there, got {now!s:.80}"

    # --- what is finished ----------------------------------------------------------------------------------------

    def _receipt(self, path: str) -> Path:
        return self._done / (hashlib.sha256(path.encode("utf-8")).hexdigest()[:32] + ".json")

    def entry(self, path: str) -> FileEntry | None:
        """The manifest's entry of a file, None if the file is not finished, or not there in that size."""
        try:
            entry = FileEntry.from_json(json.loads(self._receipt(path).read_bytes()), str(self._receipt(path)))
            size = (self.tree / path).stat().st_size
        except (FileNotFoundError, ValueError, ManifestError):
            return None
        return entry if entry.path == path and entry.stored_size == size else None

    def is_finished(self, path: str) -> bool:
        """See :class:`GrowingTree`."""
        return self.entry(path) is not None

    def look(self) -> None:
        """Fill ``finished`` from what all workers have done up to now."""
        entries = {path: self.entry(path) for path in self._plan["files"]}
        self.finished = {path: entry.to_json() for path, entry in entries.items() if entry is not None}

    def record(self, path: str, stored_size: int, entry: object) -> None:
        """See :class:`GrowingTree`."""
        sync_directory((self.tree / path).parent)
        self.write_note(self._receipt(path), json.dumps(entry).encode("ascii"))
        with self._lock:
            self.finished[path] = entry

    def write_note(self, final: Path, data: bytes) -> None:
        """Write a small file beside the tree, whole or not at all."""
        with self._create(self._temporary(""), final) as out:
            out.write(data)
        sync_directory(final.parent)

    # --- files ---------------------------------------------------------------------------------------------------

    def _temporary(self, path: str) -> Path:
        return self._tmp / f"{_host()}-{os.getpid()}-{secrets.token_hex(8)}"

    def _open(self, temporary: Path) -> BinaryIO:
        with self.still_there():
            file = super()._open(temporary)
        _try_lock(file.fileno())  # tells _remove_remains that somebody is writing it
        return file

    def _rename(self, temporary: Path, final: Path) -> None:
        with self.still_there():
            super()._rename(temporary, final)

    @contextmanager
    def still_there(self) -> Iterator[None]:
        """Raises ResumeError where a file is gone: other workers have not only finished, but merged as well."""
        try:
            yield
        except FileNotFoundError:
            raise ResumeError(
                f"{self.path}: merged or removed by another process meanwhile; there is nothing left to do, "
                "unless it was removed: then begin anew"
            ) from None

    def _remove_remains(self) -> None:
        """Remove what dead workers of this machine have left. Those of others are removed by the merge."""
        mine = re.compile(re.escape(_host()) + r"-[0-9]+-[0-9a-f]{16}")
        with self.still_there():
            paths = [path for path in self._tmp.iterdir() if mine.fullmatch(path.name)]
        for path in paths:
            with suppress(FileNotFoundError), path.open("rb") as file:
                # A file is locked before anything is written into it.
                if os.fstat(file.fileno()).st_size and _try_lock(file.fileno()):
                    path.unlink()

    # --- the end -------------------------------------------------------------------------------------------------

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Keep other merges out, where the file system can. Raises UsageError if there is one."""
        with self.still_there():
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _try_lock(fd) is False:
                raise UsageError(f"{self.path}: another merge is writing {self.dst}; wait until it has finished")
            self._restore_interrupted_swap()
            yield
        finally:
            os.close(fd)

    @property
    def published(self) -> bool:
        """Whether an earlier merge made the tree the destination, and was stopped before it could clean up."""
        try:
            return bool(json.loads((self.path / "publishing").read_bytes()) == self.dst.stat().st_ino)
        except (FileNotFoundError, ValueError):
            return False

    def check_destination(self) -> None:
        """Raises DestinationExistsError if there is one that is not to be overwritten."""
        self._check_destination()

    def publish(self) -> None:
        """Make the tree the destination, atomically, and remove the rest."""
        sync_tree(self.tree)
        self._check_destination()
        self.write_note(self.path / "publishing", str(self.tree.stat().st_ino).encode("ascii"))
        with self.still_there():
            replace(self.tree, self.dst, self.path / "old")
        self.remove()

    def remove(self) -> None:
        """Remove the staging directory, and what workers that died at their start have left beside it."""
        with suppress(FileNotFoundError):
            self.path.rename(self._beside())  # so that late workers notice at once
        for path in self.path.parent.glob(f"{glob.escape(self.path.name)}.{'[0-9a-f]' * 16}"):
            shutil.rmtree(path, ignore_errors=True)

    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")


def _host() -> str:
    return socket.gethostname().replace("/", "-")


def _try_lock(fd: int) -> bool | None:
    """Whether this process has the lock now; None where the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
