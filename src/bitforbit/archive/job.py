"""The steps of a compression in the native format, whoever takes them: one run, the workers of many, a merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitforbit import __version__
from bitforbit.archive.files import copy_file, write_small
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.progress import Progress
from bitforbit.archive.rewrite import rewrite_config, rewrite_index
from bitforbit.archive.shard_writer import FileBytes, ShardWriter, fits, hash_stored
from bitforbit.archive.source import SourceFile, SourceTree
from bitforbit.archive.tree import HOPELESS_RATIO, GrowingTree
from bitforbit.codecs import registry
from bitforbit.codecs.base import Codec
from bitforbit.errors import UsageError
from bitforbit.format.checksum import digests_of
from bitforbit.format.header import Header
from bitforbit.format.layout import Shard, open_shard
from bitforbit.format.manifest import FileEntry, Kind, Manifest
from bitforbit.format.spec import FORMAT_VERSION, INDEX_SUFFIX, MANIFEST_NAME, MAX_HEADER_BYTES


@dataclass(frozen=True)
class Settings:
    """Everything besides the source that the written bytes depend on. include and exclude are globs over names."""

    include: Collection[str] = ()
    exclude: Collection[str] = ()

    def __post_init__(self) -> None:
        """Raises UsageError for a string, whose letters would be taken for globs."""
        if isinstance(self.include, str) or isinstance(self.exclude, str):
            raise UsageError("expected include and exclude to be lists of globs, got a string; write ['*.weight']")

    @property
    def codec(self) -> Codec:
        """What codes the tensors."""
        return registry.get("planes", 1)

    def select(self, name: str) -> bool:
        """Whether the tensor of that name is to be coded."""
        included = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return included and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def options(self) -> dict[str, object]:
        """JSON-able; two runs that agree in it and in the source write the same files."""
        return {
            "format_version": FORMAT_VERSION,
            "codec": [self.codec.name, self.codec.version],
            "include": sorted(self.include),
            "exclude": sorted(self.exclude),
        }


class Job:
    """The steps of one compression, over an unpublished tree."""

    def __init__(
        self,
        tree: SourceTree,
        headers: Mapping[str, Header],
        settings: Settings,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._tree = tree
        self._settings = settings
        self._headers = {p: h for p, h in headers.items() if fits(h, settings.codec, settings.select)}
        self._threads = threads
        self._progress = progress

    @property
    def shard_paths(self) -> Sequence[str]:
        """The files that become shards."""
        return list(self._headers)

    @property
    def independent_files(self) -> list[SourceFile]:
        """Every file that is a shard or cannot be a rewritten one: each can be written without the others."""
        return [file for file in self._tree.files if not self._may_be_rewritten(file)]

    def minimum_bytes(self, files: Iterable[SourceFile]) -> int:
        """Bytes that will surely be written for these files."""
        return sum(int(f.size * HOPELESS_RATIO) if f.path in self._headers else f.size for f in files)

    def write_files(self, staging: GrowingTree, files: Iterable[SourceFile]) -> None:
        """Write those of the files that are not finished, several at a time, largest first."""
        todo = sorted((f for f in files if f.path not in staging.finished), key=lambda file: -file.size)
        largest = max((e.nbytes for f in todo if (h := self._headers.get(f.path)) for e in h.tensors), default=0)
        pipe = Pipeline(self._threads, largest, self._progress)
        pipe.progress.start(sum(file.size for file in todo), "Compressing")
        try:
            pipe.run(lambda file: self._write_file(staging, file, pipe), todo)
        finally:
            pipe.progress.finish()

    def _write_file(self, staging: GrowingTree, file: SourceFile, pipe: Pipeline) -> None:
        if staging.is_finished(file.path):  # by another worker, meanwhile
            pipe.progress.advance(file.size)
            return
        with staging.guard(file.path):
            header = self._headers.get(file.path)
            if header is None:
                entry = copy_file(file, staging, pipe)
            else:
                source, settings = FileBytes(file, header), self._settings
                with staging.create(file.path) as out:
                    digests = ShardWriter(source, header, settings.codec, settings.select, pipe).write(out)
                    out.flush()
                    stored = hash_stored(out.fileno())
                entry = FileEntry(file.path, "shard", file.size, digests.sha256 or "", stored.size, stored.xxh3_128)
            staging.record(file.path, entry.stored_size, entry.to_json())

    def _may_be_rewritten(self, file: SourceFile) -> bool:
        directory, _, name = file.path.rpartition("/")
        beside = any(path.rpartition("/")[0] == directory for path in self._headers)
        return beside and (name == "config.json" or name.endswith(INDEX_SUFFIX)) and file.size <= MAX_HEADER_BYTES

    def open_shards(self, staging: GrowingTree, files: Iterable[SourceFile]) -> dict[str, Shard]:
        """Headers and records of those of the files that are written shards, by path."""
        return {file.path: open_shard(staging.tree / file.path) for file in files if file.path in self._headers}

    def rewrite(self, staging: GrowingTree, shards: Mapping[str, Shard]) -> list[FileEntry]:
        """Write the files that depend on the shards."""
        entries = []
        for file in self._tree.files:
            if not self._may_be_rewritten(file):
                continue
            original = file.location.read_bytes()
            directory, slash, name = file.path.rpartition("/")
            beside = [shard for path, shard in shards.items() if path.rpartition("/")[0] == directory]
            stored: bytes | None = None
            if name == "config.json":
                if any(shard.compressed_tensors for shard in beside):
                    stored = rewrite_config(original, self._settings.codec.name)
            else:
                stored = rewrite_index(original, _lookup(shards, directory + slash))
            kind: Kind = "copied" if stored is None or stored == original else "rewritten"
            write_small(staging, file.path, original if stored is None else stored)
            of_original, of_stored = digests_of(original), digests_of(original if stored is None else stored)
            entries.append(
                FileEntry(
                    file.path,
                    kind,
                    of_original.size,
                    of_original.sha256 or "",
                    of_stored.size,
                    of_stored.xxh3_128,
                    original if kind == "rewritten" else None,
                )
            )
        return entries

    def write_manifest(self, staging: GrowingTree, rewritten: list[FileEntry]) -> None:
        """The manifest and the empty directories."""
        entries = rewritten + [FileEntry.from_json(v, "journal") for v in staging.finished.values()]
        for path in self._tree.directories:
            (staging.tree / path).mkdir(parents=True, exist_ok=True)
        manifest = Manifest(f"bitforbit {__version__}", self._tree.directories, entries)
        write_small(staging, MANIFEST_NAME, manifest.to_bytes())


def _lookup(shards: Mapping[str, Shard], prefix: str) -> Callable[[str], Shard | None]:
    return lambda name: shards.get(prefix + name)
