"""Model directory (or one safetensors file) -> compressed directory (or file)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from bitforbit import __version__
from bitforbit.archive import foreign
from bitforbit.archive.files import copy_file, write_small
from bitforbit.archive.filesystem import tree_bytes
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import CompressReport
from bitforbit.archive.rewrite import rewrite_config, rewrite_index
from bitforbit.archive.shard_writer import FileBytes, Select, ShardWriter, fits, hash_stored
from bitforbit.archive.source import (
    SourceFile,
    SourceTree,
    check_apart,
    check_plain,
    check_plain_header,
    quantized_components,
    refuse_kind,
    scan,
    source_file,
)
from bitforbit.archive.staging import HOPELESS_RATIO, Plan, Staging, staged
from bitforbit.codecs import registry
from bitforbit.codecs.base import Codec
from bitforbit.errors import HeaderSizeError, SourceNotFoundError, UsageError
from bitforbit.format.checksum import digests_of
from bitforbit.format.header import Header, read_header
from bitforbit.format.layout import Shard, open_shard
from bitforbit.format.manifest import FileEntry, Kind, Manifest
from bitforbit.format.spec import FORMAT_VERSION, INDEX_SUFFIX, MANIFEST_NAME, MAX_HEADER_BYTES, SHARD_SUFFIX

Format = Literal["planes", "df11"]


def compress(
    src: str | Path,
    dst: str | Path,
    *,
    format: Format = "planes",
    units: Mapping[str, Sequence[str]] | None = None,
    threads: int | None = None,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a model directory into a new directory, or one .safetensors file into a new file.

    ``include`` and ``exclude`` are globs over tensor names; what is not selected is stored as it is. The destination
    appears in one step when everything is on disk; until then results grow in ``<dst>.bitforbit-partial``, from which
    ``resume`` continues. Components of a pipeline (model_index.json) that are quantized already are copied.
    ``format="df11"`` writes a DFloat11 model; ``units`` then overrides the units derived from
    the tensors' names, in the form of that format's ``pattern_dict``.

    Raises SourceNotFoundError, PickleRefusedError, GgufRefusedError, AlreadyCompressedError, DestinationExistsError,
    DestinationInsideSourceError, ResumeError, DiskFullError, or a FormatError for a damaged safetensors file.
    """
    begin = time.perf_counter()
    src, dst = Path(src), Path(dst)
    if isinstance(include, str) or isinstance(exclude, str):
        raise UsageError("expected include and exclude to be lists of globs, got a string; write ['*.weight']")
    if format not in ("planes", "df11"):
        raise UsageError(f"expected format 'planes' or 'df11', got {format!r}")
    if format == "planes" and units is not None:
        raise UsageError("units are a matter of format='df11'; leave them out")
    check_apart(src, dst)
    if format == "df11":
        tree = scan_directory(src)
        check_plain(tree)
        return foreign.compress_df11(tree, dst, units, threads, overwrite, progress, begin)

    def select(name: str) -> bool:
        included = not include or any(fnmatchcase(name, glob) for glob in include)
        return included and not any(fnmatchcase(name, glob) for glob in exclude)

    codec = registry.get(format, 1)
    options = {
        "format_version": FORMAT_VERSION,
        "codec": [codec.name, codec.version],
        "include": sorted(include),
        "exclude": sorted(exclude),
    }
    if src.is_dir():
        tree = scan_directory(src)
        headers = check_plain(tree)
        kept = quantized_components(tree)
        headers = {path: header for path, header in headers.items() if path.rpartition("/")[0] not in kept}
    else:
        tree, headers = _single(src, dst)
    job = _Job(tree, headers, codec, select, threads, progress, single=src.is_file())
    plan = Plan(
        "compress" if src.is_dir() else "compress-file", src, options, tree.stamps, tree.total_bytes, job.minimum_bytes
    )
    with staged(dst, plan, overwrite=overwrite, resume=resume) as staging:
        resumed = len(staging.finished)
        job.write_files(staging)
        shards = job.open_shards(staging)
        if src.is_dir():
            job.write_manifest(staging, job.rewrite(staging, shards))
        compressed_bytes = tree_bytes(staging.tree)
        staging.publish(None if src.is_dir() else src.name)
    weights = [(s.stored_bytes(e), e) for s in shards.values() for e in s.original.tensors]
    stored = sum(size for size, _ in weights)
    elements = sum(e.elements for _, e in weights)
    return CompressReport(
        source=str(src),
        destination=str(dst),
        format=format,
        original_bytes=tree.total_bytes,
        compressed_bytes=compressed_bytes,
        weight_original_bytes=sum(e.nbytes for _, e in weights),
        weight_compressed_bytes=stored,
        elements=elements,
        bits_per_weight=8 * stored / elements if elements else 0.0,
        files=len(tree.files),
        shards=len(shards),
        tensors=len(weights),
        compressed_tensors=sum(s.compressed_tensors for s in shards.values()),
        resumed_files=resumed,
        seconds=time.perf_counter() - begin,
    )


def scan_directory(src: Path) -> SourceTree:
    """The tree of a source directory. Raises SourceNotFoundError, PickleRefusedError or GgufRefusedError for others."""
    if not src.is_dir():
        if src.exists():
            refuse_kind(src, [src.name])
        raise SourceNotFoundError(f"{src}: expected a model directory, got {'a file' if src.exists() else 'nothing'}")
    return scan(src)


def _single(src: Path, dst: Path) -> tuple[SourceTree, dict[str, Header]]:
    file = source_file(src)
    if not src.name.endswith(SHARD_SUFFIX):
        refuse_kind(src, [src.name])
        raise SourceNotFoundError(f"{src}: expected a model directory or a .safetensors file, got another file")
    if dst.is_dir():
        raise UsageError(f"{dst}: expected the name of a new file, as the source is a file, got a directory")
    header = read_header(src)
    check_plain_header(header, src)
    return SourceTree(src.parent, [file], []), {file.path: header}


class _Job:
    """The steps of one compression, over an unpublished tree."""

    def __init__(
        self,
        tree: SourceTree,
        headers: dict[str, Header],
        codec: Codec,
        select: Select,
        threads: int | None,
        progress: Progress | None,
        single: bool,
    ) -> None:
        self._tree = tree
        self._codec = codec
        self._select = select
        self._headers = {path: header for path, header in headers.items() if fits(header, codec, select)}
        if single and not self._headers:
            raise HeaderSizeError(f"{tree.files[0].location}: too many tensors for the header of a compressed shard")
        largest = max((e.nbytes for h in headers.values() for e in h.tensors), default=0)
        self._pipe = Pipeline(threads, largest, progress)

    @property
    def minimum_bytes(self) -> int:
        """Bytes that will surely be written."""
        coded = sum(header.file_size for header in self._headers.values())
        return self._tree.total_bytes - coded + int(coded * HOPELESS_RATIO)

    def write_files(self, staging: Staging) -> None:
        """Every file that is a shard or cannot be a rewritten one, several at a time, largest first."""
        todo = [f for f in self._tree.files if f.path not in staging.finished and not self._may_be_rewritten(f)]
        todo.sort(key=lambda file: -file.size)
        self._pipe.progress.start(sum(file.size for file in todo), "Compressing")
        try:
            self._pipe.run(lambda file: self._write_file(staging, file), todo)
        finally:
            self._pipe.progress.finish()

    def _write_file(self, staging: Staging, file: SourceFile) -> None:
        with staging.guard(file.path):
            header = self._headers.get(file.path)
            if header is None:
                entry = copy_file(file, staging, self._pipe)
            else:
                with staging.create(file.path) as out:
                    digests = ShardWriter(FileBytes(file, header), header, self._codec, self._select, self._pipe).write(
                        out
                    )
                    out.flush()
                    stored = hash_stored(out.fileno())
                entry = FileEntry(file.path, "shard", file.size, digests.sha256 or "", stored.size, stored.xxh3_128)
            staging.record(file.path, entry.stored_size, entry.to_json())

    def _may_be_rewritten(self, file: SourceFile) -> bool:
        directory, _, name = file.path.rpartition("/")
        beside = any(path.rpartition("/")[0] == directory for path in self._headers)
        return beside and (name == "config.json" or name.endswith(INDEX_SUFFIX)) and file.size <= MAX_HEADER_BYTES

    def open_shards(self, staging: Staging) -> dict[str, Shard]:
        """Headers and records of the written shards, by path."""
        return {path: open_shard(staging.tree / path) for path in self._headers}

    def rewrite(self, staging: Staging, shards: dict[str, Shard]) -> list[FileEntry]:
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
                    stored = rewrite_config(original, self._codec.name)
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

    def write_manifest(self, staging: Staging, rewritten: list[FileEntry]) -> None:
        """The manifest and the empty directories."""
        entries = rewritten + [FileEntry.from_json(v, "journal") for v in staging.finished.values()]
        for path in self._tree.directories:
            (staging.tree / path).mkdir(parents=True, exist_ok=True)
        manifest = Manifest(f"bitforbit {__version__}", self._tree.directories, entries)
        write_small(staging, MANIFEST_NAME, manifest.to_bytes())


def _lookup(shards: dict[str, Shard], prefix: str) -> Callable[[str], Shard | None]:
    return lambda name: shards.get(prefix + name)
