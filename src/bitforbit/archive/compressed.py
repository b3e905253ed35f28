"""Opening what ``compress`` wrote: a directory with its manifest, or a single shard, as one list of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitforbit.archive.source import SourceFile, refuse_kind, source_file
from bitforbit.errors import ManifestError, MissingPartError, MixedFilesError, NotCompressedError, SourceNotFoundError
from bitforbit.format.header import read_header
from bitforbit.format.layout import Shard, is_shard, open_shard
from bitforbit.format.manifest import FileEntry, read_manifest
from bitforbit.format.spec import MANIFEST_NAME, SHARD_SUFFIX


@dataclass(frozen=True, slots=True)
class CompressedModel:
    """A compressed directory, or a single shard (``single``). Files are those that the original had."""

    root: Path
    single: bool
    files: Sequence[FileEntry]
    directories: Sequence[str]

    def locate(self, entry: FileEntry) -> SourceFile:
        """The stored file of an entry. Raises MissingPartError."""
        location = self.root / entry.path
        try:
            return SourceFile(entry.path, *_found(location))
        except SourceNotFoundError as e:
            raise MissingPartError(f"{location}: the manifest names this file, but: {e}; fetch it again") from None

    def open_shard(self, entry: FileEntry) -> Shard:
        """The shard of an entry. Raises FormatError, among them MixedFilesError."""
        location = self.locate(entry).location
        if self.single:
            return open_shard(location)
        try:
            shard = open_shard(location)
        except ManifestError:
            if not is_shard(read_header(location)):
                check_same(entry, location, None, self.root / MANIFEST_NAME)
            raise
        check_same(entry, location, shard, self.root / MANIFEST_NAME)
        return shard

    def open_shards(self) -> Mapping[str, Shard]:
        """All shards by path."""
        return {entry.path: self.open_shard(entry) for entry in self.files if entry.kind == "shard"}


def check_same(entry: FileEntry, location: Path, shard: Shard | None, manifest: Path) -> None:
    """Raise MixedFilesError unless a file is what the manifest says of it: a shard, of the original named there.

    ``shard`` None: the file is a plain one.
    """
    expected = f"expected a shard of an original of {entry.size} bytes, SHA-256 {entry.sha256}, as {manifest} says"
    advice = "files of two models are mixed: fetch this one again, or all"
    if shard is None:
        raise MixedFilesError(f"{location}: {expected}, got a file that is not compressed; {advice}")
    original = shard.record.file
    if (original.size, original.sha256) != (entry.size, entry.sha256):
        raise MixedFilesError(f"{location}: {expected}, got one of {original.size} bytes, {original.sha256}; {advice}")


def _found(location: Path) -> tuple[Path, int, int]:
    file = source_file(location)
    return file.location, file.size, file.mtime_ns


def is_compressed(path: Path) -> bool:
    """Whether ``open_compressed`` would take it for a compressed model. Raises FormatError for a damaged shard."""
    if path.is_dir():
        return (path / MANIFEST_NAME).is_file()
    return path.name.endswith(SHARD_SUFFIX) and is_shard(read_header(path))


def _refuse_components(directory: Path) -> None:
    """Raise NotCompressedError for a pipeline whose components were saved compressed, each by itself."""
    names = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST_NAME}"))
    if names and not (directory / MANIFEST_NAME).is_file():
        raise NotCompressedError(
            f"{directory}: expected a directory with {MANIFEST_NAME}, got one whose parts were compressed one by one; "
            f"name one of them: {', '.join(names)}"
        )


def open_compressed(path: Path) -> CompressedModel:
    """A compressed directory or shard.

    Raises SourceNotFoundError, NotCompressedError, or a FormatError if the manifest or the single shard is damaged.
    """
    if path.is_dir():
        _refuse_components(path)
        manifest = read_manifest(path)
        return CompressedModel(path, False, manifest.files, manifest.directories)
    file = source_file(path)
    if not path.name.endswith(SHARD_SUFFIX):
        refuse_kind(path, [path.name])
    if not path.name.endswith(SHARD_SUFFIX) or not is_shard(read_header(path)):
        raise NotCompressedError(
            f"{path}: expected a shard compressed by bitforbit, got another file; compress it first"
        )
    shard = open_shard(path)
    original = shard.record.file
    entry = FileEntry(path.name, "shard", original.size, original.sha256, file.size, "")
    return CompressedModel(path.parent, True, [entry], [])
