"""Check everything that a compressed model holds, without writing anything."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.compressed import CompressedModel, open_compressed
from bitforbit.archive.decompress import check_copied, check_original
from bitforbit.archive.files import hash_file
from bitforbit.archive.pipeline import CHUNK_BYTES, Pipeline
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import Failure, VerifyReport
from bitforbit.archive.shard_reader import ShardReader, check_file
from bitforbit.archive.source import SourceFile, SourceTree, scan, source_file
from bitforbit.codecs.base import Bytes
from bitforbit.errors import BitforbitError, FormatError, SourceNotFoundError, VerificationError
from bitforbit.format.layout import Shard
from bitforbit.format.manifest import FileEntry
from bitforbit.format.spec import MANIFEST_NAME


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every checksum of a compressed directory or shard, and decode everything.

    With ``against`` the restored bytes are compared with the original directory or file too. Goes on after a failure
    and reports them all. Raises SourceNotFoundError or NotCompressedError only.
    """
    begin = time.perf_counter()
    path = Path(path)
    original = None if against is None else Path(against)
    if original is not None and not original.exists():
        raise SourceNotFoundError(f"{original}: expected the original model, got nothing")
    failures: list[Failure] = []
    model = CompressedModel(path, False, [], [])
    try:
        model = open_compressed(path)
    except FormatError as e:
        failures.append(Failure(MANIFEST_NAME if path.is_dir() else path.name, None, type(e).__name__, str(e)))
    job = _Job(model, original, failures)
    tensors = job.run(threads, progress)
    unknown = job.unknown_files() if not failures or model.files else []
    failures.sort(key=lambda failure: (failure.path, failure.tensor or ""))
    return VerifyReport(
        path=str(path),
        against=None if original is None else str(original),
        ok=not failures,
        files=len(model.files),
        tensors=tensors,
        restored_bytes=sum(entry.size for entry in model.files),
        seconds=time.perf_counter() - begin,
        errors=failures,
        unknown_files=unknown,
    )


class _Job:
    """One verification; failures are collected from several threads."""

    def __init__(self, model: CompressedModel, against: Path | None, failures: list[Failure]) -> None:
        self._model = model
        self._failures = failures
        self._lock = threading.Lock()
        self._original: SourceTree | None = None
        if against is not None:
            single = SourceTree(against.parent, [source_file(against)], []) if against.is_file() else None
            self._original = scan(against) if single is None else single

    def _fail(self, path: str, tensor: str | None, error: BaseException) -> None:
        with self._lock:
            self._failures.append(Failure(path, tensor, type(error).__name__, str(error)))

    def run(self, threads: int | None, progress: Progress | None) -> int:
        """Check all files; returns the number of tensors looked at."""
        shards: dict[str, Shard] = {}
        todo: list[FileEntry] = []
        for entry in sorted(self._model.files, key=lambda e: -e.size):
            try:
                if entry.kind == "shard":
                    shards[entry.path] = self._model.open_shard(entry)
                todo.append(entry)
            except (BitforbitError, OSError) as e:
                self._fail(entry.path, None, e)
        if self._original is not None and not self._model.single:
            self._compare_names(self._original)
        largest = max((e.nbytes for shard in shards.values() for e in shard.original.tensors), default=0)
        pipe = Pipeline(threads, largest, progress)
        pipe.progress.start(sum(entry.size for entry in todo), "Verifying")
        try:
            pipe.run(lambda entry: self._check_entry(entry, shards, pipe), todo)
        finally:
            pipe.progress.finish()
        return sum(len(shard.original.tensors) for shard in shards.values())

    def _compare_names(self, original: SourceTree) -> None:
        names, expected = {entry.path for entry in self._model.files}, {file.path for file in original.files}
        for path in sorted(expected - names):
            self._fail(path, None, VerificationError(f"{path}: in the original, but not in {self._model.root}"))
        if set(original.directories) != set(self._model.directories):
            self._fail("", None, VerificationError("empty directories: not the same as in the original"))

    def _check_entry(self, entry: FileEntry, shards: Mapping[str, Shard], pipe: Pipeline) -> None:
        try:
            file = self._model.locate(entry)
            comparison = None if self._original is None else self._comparison(entry)
            if entry.stored_xxh3_128:
                self._check_stored(file, entry, pipe)
        except (BitforbitError, OSError) as e:
            self._fail(entry.path, None, e)
            comparison = None
        try:
            if entry.kind == "shard":
                self._check_shard(entry, ShardReader(shards[entry.path], pipe), comparison)
            elif entry.original is not None:
                check_original(self._model.root / MANIFEST_NAME, entry)
                if comparison is not None:
                    comparison(entry.original)
            elif comparison is not None:
                comparison.file(file.location, file.size)
            if comparison is not None:
                comparison.finish()
        except (BitforbitError, OSError) as e:
            self._fail(entry.path, None, e)
        if entry.kind != "shard":
            pipe.progress.advance(entry.size)

    def _check_stored(self, file: SourceFile, entry: FileEntry, pipe: Pipeline) -> None:
        fd = os.open(file.location, os.O_RDONLY)
        try:
            with pipe.hasher(sha256=entry.kind == "copied") as hasher:
                hash_file(fd, file.size, str(file.location), hasher, pipe)
                digests = hasher.digests()
        finally:
            os.close(fd)
        check_copied(file.location, entry, digests.xxh3_128, digests.sha256)

    def _check_shard(self, entry: FileEntry, reader: ShardReader, comparison: Comparison | None) -> None:
        failed: list[str] = []

        def on_error(tensor: str, error: BitforbitError) -> None:
            failed.append(tensor)
            self._fail(entry.path, tensor, error)

        digests = reader.restore(comparison or _ignore, sha256=True, on_error=on_error)
        if not failed:  # a file with a wrong tensor has wrong checksums: one failure is enough
            check_file(reader.shard, digests)

    def _comparison(self, entry: FileEntry) -> Comparison:
        files = {} if self._original is None else {file.path: file for file in self._original.files}
        if self._model.single and len(files) == 1:
            return Comparison(next(iter(files.values())))
        if entry.path not in files:
            raise VerificationError(f"{entry.path}: in {self._model.root}, but not in the original")
        return Comparison(files[entry.path])

    def unknown_files(self) -> list[str]:
        """Files in the directory that the manifest does not name."""
        if self._model.single:
            return []
        known = {MANIFEST_NAME, *(entry.path for entry in self._model.files)}
        try:
            return [file.path for file in scan(self._model.root).files if file.path not in known]
        except BitforbitError as e:
            self._fail("", None, e)
            return []


def _ignore(data: Bytes | bytes) -> None:
    """Sink for bytes that only the hash needs."""


class Comparison:
    """A sink that compares what it gets with a file, and remembers the first byte that differs."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._position = 0
        self._first_difference: int | None = None

    def __call__(self, data: Bytes | bytes) -> None:
        """Compare the next bytes."""
        got = np.frombuffer(data, dtype=np.uint8)
        fd = os.open(self._file.location, os.O_RDONLY)
        try:
            for begin in range(0, len(got), CHUNK_BYTES):
                piece = got[begin : begin + CHUNK_BYTES]
                expected = aligned_buffer(max(0, min(len(piece), self._file.size - self._position)))
                read_exactly(fd, expected, self._position, str(self._file.location))
                self._note(piece, expected)
                self._position += len(piece)
        finally:
            os.close(fd)

    def _note(self, piece: Bytes, expected: Bytes) -> None:
        common = piece[: len(expected)]
        if self._first_difference is None and not np.array_equal(common, expected):
            self._first_difference = self._position + int(np.flatnonzero(common != expected)[0])

    def file(self, location: Path, size: int) -> None:
        """Compare the whole content of another file."""
        fd = os.open(location, os.O_RDONLY)
        try:
            for offset in range(0, size, CHUNK_BYTES):
                data = aligned_buffer(min(CHUNK_BYTES, size - offset))
                read_exactly(fd, data, offset, str(location))
                self(data)
        finally:
            os.close(fd)

    def finish(self) -> None:
        """Raises VerificationError if anything differed."""
        where = str(self._file.location)
        if self._first_difference is not None:
            raise VerificationError(
                f"{where}: expected the same bytes, first difference at byte {self._first_difference}"
            )
        if self._position != self._file.size:
            raise VerificationError(
                f"{where}: expected {self._file.size} bytes, the restored file has {self._position}"
            )
