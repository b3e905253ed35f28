"""The parts of a compression -> the destination, byte for byte what one run writes."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from bitforbit.archive.filesystem import tree_bytes
from bitforbit.archive.job import Job, Settings
from bitforbit.archive.parts import PARTS_SUFFIX, Parts, plan_of, read_plan
from bitforbit.archive.report import CompressReport, compress_report
from bitforbit.archive.source import check_apart, scan_directory, shards_to_compress
from bitforbit.errors import IncompletePartsError, ResumeError

_NAMED = 20
"""Missing files that an error message names."""


def merge(
    src: str | Path,
    dst: str | Path,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] | None = None,
    overwrite: bool = False,
) -> CompressReport:
    """Make the destination of what ``compress(src, dst, part=(i, n))`` has written for all i.

    Writes the index, the configs and the manifest, then renames; moves and reads no weights. ``include`` and
    ``exclude`` are those of the parts; where given they must be the same. Can be repeated after an interruption.

    Raises IncompletePartsError with the files that are missing, ResumeError for parts of another version, source or
    other settings (which are left as they are), DestinationExistsError, or UsageError for two merges at a time.
    """
    begin = time.perf_counter()
    src, dst = Path(src), Path(dst)
    check_apart(src, dst)
    tree = scan_directory(src)
    path = dst.resolve().with_name(dst.resolve().name + PARTS_SUFFIX)
    plan = read_plan(path)
    if plan is None:
        raise ResumeError(f"{path}: expected parts of a compression, got none; compress them first (--shards i/n)")
    settings = Settings(
        plan.get("include", ()) if include is None else include, plan.get("exclude", ()) if exclude is None else exclude
    )
    job = Job(tree, shards_to_compress(tree), settings)
    parts = Parts(dst, plan_of(tree, settings), tree.total_bytes, overwrite=overwrite)
    parts.check_plan()
    with parts.merging():
        if parts.published:
            parts.tree = parts.dst
            shards = job.open_shards(parts, tree.files)
            compressed_bytes = tree_bytes(parts.tree)
            parts.remove()
        else:
            parts.check_destination()
            _check_complete(job, parts)
            shards = job.open_shards(parts, tree.files)
            job.write_manifest(parts, job.rewrite(parts, shards))
            compressed_bytes = tree_bytes(parts.tree)
            parts.publish()
    return compress_report(src, dst, tree.files, shards.values(), compressed_bytes, 0, begin)


def _check_complete(job: Job, parts: Parts) -> None:
    parts.look()
    files = job.independent_files
    missing = [file.path for file in files if file.path not in parts.finished]
    if missing:
        names = ", ".join(missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise IncompletePartsError(
            f"{parts.path}: expected {len(files)} compressed files, got {len(files) - len(missing)}; missing: "
            f"{names}{more}. Run the parts again (--shards i/n), which keeps finished files; then merge"
        )
