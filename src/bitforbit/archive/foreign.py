"""The one door to the DFloat11 package, opened only when such a model is asked for."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitforbit.archive.filesystem import sync_files, tree_bytes
from bitforbit.archive.progress import NoProgress, Progress
from bitforbit.archive.report import CompressReport, DecompressReport
from bitforbit.archive.source import SourceTree, check_plain, scan
from bitforbit.archive.staging import HOPELESS_RATIO, Plan, staged
from bitforbit.format.header import Header, read_header
from bitforbit.format.spec import SHARD_SUFFIX

_MODULE = "bitforbit.archive.dfloat11"


def _write_df11(
    src: Path, tree: Path, *, units: Sequence[str] | None, threads: int | None, progress: Progress | None
) -> None:
    """Write the DFloat11 form of a plain model into the existing empty directory ``tree``; durable on return."""
    package: Any = importlib.import_module(_MODULE)
    package.write_directory(src, tree, units=units, threads=threads, progress=progress or NoProgress())
    sync_files(tree)


def _write_plain(
    src: Path,
    tree: Path,
    *,
    threads: int | None,
    shapes: Mapping[str, Sequence[int]] | None,
    progress: Progress | None,
) -> None:
    """Write the plain form of a DFloat11 model into the existing empty directory ``tree``; durable on return."""
    package: Any = importlib.import_module(_MODULE)
    package.write_plain(src, tree, threads=threads, shapes=shapes, progress=progress or NoProgress())
    sync_files(tree)


def _headers(tree: Path) -> list[Header]:
    """Headers of all safetensors files below a directory."""
    return [read_header(path) for path in sorted(tree.rglob("*" + SHARD_SUFFIX))]


def compress_df11(
    tree: SourceTree,
    dst: Path,
    units: Sequence[str] | None,
    threads: int | None,
    overwrite: bool,
    progress: Progress | None,
    begin: float,
) -> CompressReport:
    """Plain model -> DFloat11 model, atomically; ``begin`` is the ``time.perf_counter()`` of the start."""
    minimum = int(tree.total_bytes * HOPELESS_RATIO)
    plan = Plan("compress-df11", tree.root, {"units": units}, tree.stamps, tree.total_bytes, minimum)
    with staged(dst, plan, overwrite=overwrite, resume=False) as staging:
        _write_df11(tree.root, staging.tree, units=units, threads=threads, progress=progress)
        compressed_bytes = tree_bytes(staging.tree)
        stored = sum(header.file_size - header.data_start for header in _headers(staging.tree))
        staging.publish()
    headers = check_plain(tree)
    entries = [e for h in headers.values() for e in h.tensors]
    elements = sum(e.elements for e in entries)
    return CompressReport(
        source=str(tree.root),
        destination=str(dst),
        format="df11",
        original_bytes=tree.total_bytes,
        compressed_bytes=compressed_bytes,
        weight_original_bytes=sum(e.nbytes for e in entries),
        weight_compressed_bytes=stored,
        elements=elements,
        bits_per_weight=8 * stored / elements if elements else 0.0,
        files=len(tree.files),
        shards=len(headers),
        tensors=len(entries),
        compressed_tensors=0,
        resumed_files=0,
        seconds=time.perf_counter() - begin,
    )


def decompress_df11(
    src: Path,
    dst: Path,
    threads: int | None,
    shapes: Mapping[str, Sequence[int]] | None,
    overwrite: bool,
    progress: Progress | None,
    begin: float,
) -> DecompressReport:
    """DFloat11 model -> plain model, atomically; ``begin`` is the ``time.perf_counter()`` of the start."""
    tree = scan(src)
    plan = Plan("decompress-df11", src, {}, tree.stamps, 2 * tree.total_bytes, tree.total_bytes)
    with staged(dst, plan, overwrite=overwrite, resume=False) as staging:
        _write_plain(src, staging.tree, threads=threads, shapes=shapes, progress=progress)
        restored_bytes = tree_bytes(staging.tree)
        headers = _headers(staging.tree)
        staging.publish()
    return DecompressReport(
        source=str(src),
        destination=str(dst),
        format="df11",
        compressed_bytes=tree.total_bytes,
        restored_bytes=restored_bytes,
        files=len(tree.files),
        shards=len(headers),
        tensors=sum(len(header.tensors) for header in headers),
        resumed_files=0,
        sha256=False,
        seconds=time.perf_counter() - begin,
    )
