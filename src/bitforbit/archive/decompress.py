"""Compressed directory (or shard) -> the original files, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitforbit.archive import foreign
from bitforbit.archive.compressed import CompressedModel, open_compressed
from bitforbit.archive.files import copy_file, write_small
from bitforbit.archive.filesystem import tree_bytes
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import DecompressReport
from bitforbit.archive.shard_reader import ShardReader, check_file
from bitforbit.archive.source import check_apart, df11_config
from bitforbit.archive.staging import Plan, Staging, staged
from bitforbit.errors import ChecksumError, UsageError
from bitforbit.format.checksum import digests_of
from bitforbit.format.layout import Shard
from bitforbit.format.manifest import FileEntry
from bitforbit.format.spec import MANIFEST_NAME


def decompress(
    src: str | Path,
    dst: str | Path,
    *,
    threads: int | None = None,
    sha256: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> DecompressReport:
    """Restore the original files of a compressed directory into a new directory, or of one shard into a new file.

    Every tensor is checked before and after decoding (XXH3-64), and every file against the XXH3-128 of the original.
    ``sha256`` adds its SHA-256, which takes longer than all the rest on CPUs without instructions for it. A DFloat11
    directory becomes a plain model; ``shapes`` names shapes that it does not state. The destination appears in one
    step; ``resume`` continues an unfinished run.

    Raises SourceNotFoundError, NotCompressedError, DestinationExistsError, DestinationInsideSourceError, ResumeError,
    DiskFullError, ChecksumError, or another FormatError.
    """
    begin = time.perf_counter()
    src, dst = Path(src), Path(dst)
    check_apart(src, dst)
    if src.is_dir() and not (src / MANIFEST_NAME).is_file() and df11_config(src):
        return foreign.decompress_df11(src, dst, threads, shapes, overwrite, progress, begin)
    if shapes is not None:
        raise UsageError("shapes are a matter of DFloat11 models; leave them out")
    model = open_compressed(src)
    if model.single and dst.is_dir():
        raise UsageError(f"{dst}: expected the name of a new file, as the source is a file, got a directory")
    sources = [model.locate(entry) for entry in model.files]
    shards = model.open_shards()
    restored_bytes = sum(entry.size for entry in model.files)
    stamps = {file.path: file.stamp for file in sources}
    plan = Plan("decompress", src, {"sha256": sha256}, stamps, restored_bytes, restored_bytes)
    largest = max((e.nbytes for shard in shards.values() for e in shard.original.tensors), default=0)
    job = _Job(model, shards, Pipeline(threads, largest, progress), sha256)
    with staged(dst, plan, overwrite=overwrite, resume=resume) as staging:
        resumed = len(staging.finished)
        job.write_files(staging)
        for path in model.directories:
            (staging.tree / path).mkdir(parents=True, exist_ok=True)
        staging.publish(src.name if model.single else None)
    return DecompressReport(
        source=str(src),
        destination=str(dst),
        format="planes",
        compressed_bytes=src.stat().st_size if model.single else tree_bytes(src),
        restored_bytes=restored_bytes,
        files=len(model.files),
        shards=len(shards),
        tensors=sum(len(shard.original.tensors) for shard in shards.values()),
        resumed_files=resumed,
        sha256=sha256,
        seconds=time.perf_counter() - begin,
    )


class _Job:
    """The steps of one decompression, into an unpublished tree."""

    def __init__(self, model: CompressedModel, shards: Mapping[str, Shard], pipe: Pipeline, sha256: bool) -> None:
        self._model = model
        self._readers = {path: ShardReader(shard, pipe) for path, shard in shards.items()}
        self._pipe = pipe
        self._sha256 = sha256

    def write_files(self, staging: Staging) -> None:
        """Every file, several at a time, largest first."""
        todo = sorted((e for e in self._model.files if e.path not in staging.finished), key=lambda e: -e.size)
        self._pipe.progress.start(sum(entry.size for entry in todo), "Decompressing")
        try:
            self._pipe.run(lambda entry: self._write_file(staging, entry), todo)
        finally:
            self._pipe.progress.finish()

    def _write_file(self, staging: Staging, entry: FileEntry) -> None:
        with staging.guard(entry.path):
            if entry.original is not None:
                check_original(self._model.root / MANIFEST_NAME, entry)
                write_small(staging, entry.path, entry.original)
                self._pipe.progress.advance(entry.size)
            elif entry.kind == "shard":
                reader = self._readers[entry.path]
                with staging.create(entry.path) as out:
                    check_file(reader.shard, reader.restore(out.write, sha256=self._sha256))
            else:
                copied = copy_file(self._model.locate(entry), staging, self._pipe, self._sha256)
                check_copied(self._model.root / entry.path, entry, copied.stored_xxh3_128, copied.sha256 or None)
            staging.record(entry.path, entry.size, None)


def check_original(where: Path, entry: FileEntry) -> None:
    """Check a rewritten file's original bytes. Raises ChecksumError."""
    got = digests_of(entry.original or b"").sha256
    if got != entry.sha256:
        raise ChecksumError(f"{where}, original of {entry.path!r}: expected SHA-256 {entry.sha256}, got {got}")


def check_copied(where: Path, entry: FileEntry, xxh3_128: str, sha256: str | None) -> None:
    """Check a copied file's checksums; ``sha256`` None leaves that one out. Raises ChecksumError."""
    for what, expected, got in (("XXH3-128", entry.stored_xxh3_128, xxh3_128), ("SHA-256", entry.sha256, sha256)):
        if got is not None and got != expected:
            raise ChecksumError(f"{where}: expected {what} {expected}, got {got}; the file is damaged, fetch it again")
