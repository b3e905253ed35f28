"""One n-th of a compression."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

from bitforbit.archive.job import Job, Settings
from bitforbit.archive.parts import Parts, plan_of
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import CompressReport, compress_report
from bitforbit.archive.source import SourceFile, scan_directory, shards_to_compress
from bitforbit.errors import UsageError


def compress_part(
    src: Path,
    dst: Path,
    part: tuple[int, int],
    settings: Settings,
    threads: int | None,
    overwrite: bool,
    progress: Progress | None,
    begin: float,
) -> CompressReport:
    """``compress`` for the i-th n-th of the files; ``begin`` is the ``time.perf_counter()`` of the start."""
    tree = scan_directory(src)
    job = Job(tree, shards_to_compress(tree), settings, threads, progress)
    mine = files_of_part(job.independent_files, part)
    parts = Parts(dst, plan_of(tree, settings), sum(file.size for file in mine), overwrite=overwrite)
    parts.open(job.minimum_bytes(mine))
    resumed = sum(file.path in parts.finished for file in mine)
    job.write_files(parts, mine)
    with parts.still_there():
        shards = job.open_shards(parts, mine)
        compressed_bytes = sum((parts.tree / file.path).stat().st_size for file in mine)
    parts.look()
    remaining = sum(file.path not in parts.finished for file in job.independent_files)
    return compress_report(src, dst, mine, shards.values(), compressed_bytes, resumed, begin, part, remaining)


def files_of_part(files: Sequence[SourceFile], part: tuple[int, int]) -> list[SourceFile]:
    """The i-th of n shares of the files, balanced by bytes: largest first, each to the share with the fewest bytes.

    Depends on the files' paths and sizes alone. A share is empty where there are fewer files than shares.
    Raises UsageError unless 1 <= i <= n.
    """
    index, count = part
    if not 1 <= index <= count:
        raise UsageError(f"expected part i of n with 1 <= i <= n, got {index} of {count}")
    shares = [(0, i) for i in range(1, count + 1)]
    mine = []
    for file in sorted(files, key=lambda f: (-f.size, f.path)):
        nbytes, share = shares[0]
        heapq.heapreplace(shares, (nbytes + file.size, share))
        if share == index:
            mine.append(file)
    return mine
