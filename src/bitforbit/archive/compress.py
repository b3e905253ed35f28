"""Model directory (or one safetensors file) -> compressed directory (or file)."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from bitforbit.archive import foreign
from bitforbit.archive.filesystem import tree_bytes
from bitforbit.archive.job import Job, Settings
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import CompressReport, compress_report
from bitforbit.archive.share import compress_part
from bitforbit.archive.source import (
    SourceTree,
    check_apart,
    check_plain,
    check_plain_header,
    refuse_kind,
    scan_directory,
    shards_to_compress,
    source_file,
)
from bitforbit.archive.staging import Plan, staged
from bitforbit.errors import HeaderSizeError, SourceNotFoundError, UsageError
from bitforbit.format.header import Header, read_header
from bitforbit.format.spec import SHARD_SUFFIX

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
    part: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a model directory into a new directory, or one .safetensors file into a new file.

    ``include`` and ``exclude`` are globs over tensor names; what is not selected is stored as it is. The destination
    appears in one step when everything is on disk; until then results grow in ``<dst>.bitforbit-partial``, from which
    ``resume`` continues. Components of a pipeline (model_index.json) that are quantized already are copied.
    ``format="df11"`` writes a DFloat11 model; ``units`` then overrides the units derived from
    the tensors' names, in the form of that format's ``pattern_dict``.

    ``part=(i, n)``, 1 <= i <= n, compresses the i-th n-th of a directory's files only, for many machines with a shared
    file system; :func:`~bitforbit.archive.merge.merge` makes the destination when all are done. Parts can be
    repeated, taken twice at a time, and cut in another way (another n) at any moment: finished files stay.

    Raises SourceNotFoundError, PickleRefusedError, GgufRefusedError, AlreadyCompressedError, DestinationExistsError,
    DestinationInsideSourceError, ResumeError, DiskFullError, or a FormatError for a damaged safetensors file.
    """
    begin = time.perf_counter()
    src, dst = Path(src), Path(dst)
    settings = Settings(include, exclude)
    if format not in ("planes", "df11"):
        raise UsageError(f"expected format 'planes' or 'df11', got {format!r}")
    if format == "planes" and units is not None:
        raise UsageError("units are a matter of format='df11'; leave them out")
    if part is not None and (format != "planes" or src.is_file()):
        raise UsageError("parts are for directories and the native format; leave part (--shards) out")
    check_apart(src, dst)
    if format == "df11":
        tree = scan_directory(src)
        check_plain(tree)
        return foreign.compress_df11(tree, dst, units, threads, overwrite, progress, begin)
    if part is not None:
        return compress_part(src, dst, part, settings, threads, overwrite, progress, begin)
    if src.is_dir():
        tree = scan_directory(src)
        headers = shards_to_compress(tree)
    else:
        tree, headers = _single(src, dst)
    job = Job(tree, headers, settings, threads, progress)
    if src.is_file() and not job.shard_paths:
        raise HeaderSizeError(f"{src}: too many tensors for the header of a compressed shard")
    operation = "compress" if src.is_dir() else "compress-file"
    minimum_bytes = job.minimum_bytes(tree.files)
    plan = Plan(operation, src, settings.options(), tree.stamps, tree.total_bytes, minimum_bytes)
    with staged(dst, plan, overwrite=overwrite, resume=resume) as staging:
        resumed = len(staging.finished)
        job.write_files(staging, job.independent_files)
        shards = job.open_shards(staging, tree.files)
        if src.is_dir():
            job.write_manifest(staging, job.rewrite(staging, shards))
        compressed_bytes = tree_bytes(staging.tree)
        staging.publish(None if src.is_dir() else src.name)
    return compress_report(src, dst, tree.files, shards.values(), compressed_bytes, resumed, begin)


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
