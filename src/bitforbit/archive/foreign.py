"""DFloat11 models behind the same atomic staging and reports as the native format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bitforbit.archive import dfloat11
from bitforbit.archive.filesystem import sync_files, tree_bytes
from bitforbit.archive.progress import NoProgress, Progress
from bitforbit.archive.report import CompressReport, DecompressReport
from bitforbit.archive.source import SourceTree, check_plain, scan
from bitforbit.archive.staging import Plan, staged
from bitforbit.archive.tree import HOPELESS_RATIO
from bitforbit.codecs.df11.unit import TENSOR_NAMES
from bitforbit.cpu import default_threads
from bitforbit.format.header import Header, TensorEntry, read_header
from bitforbit.format.spec import SHARD_SUFFIX


@contextmanager
def _advancing(progress: Progress | None, total_bytes: int, description: str) -> Iterator[Callable[[int], None]]:
    """What the DFloat11 functions call with bytes as they are done."""
    sink = NoProgress() if progress is None else progress
    sink.start(total_bytes, description)
    try:
        yield sink.advance
    finally:
        sink.finish()


def _headers(tree: Path) -> list[Header]:
    """Headers of all safetensors files below a directory."""
    return [read_header(path) for path in sorted(tree.rglob("*" + SHARD_SUFFIX))]


def _restored_bytes(entry: TensorEntry) -> int:
    """What a stored tensor adds to the plain model: two bytes per byte of sign and mantissa, itself if it is plain."""
    part = entry.name.rpartition(".")[2]
    if part == "sign_mantissa":
        return 2 * entry.nbytes
    return 0 if part in TENSOR_NAMES else entry.nbytes


def compress_df11(
    tree: SourceTree,
    dst: Path,
    units: Mapping[str, Sequence[str]] | None,
    threads: int | None,
    overwrite: bool,
    progress: Progress | None,
    begin: float,
) -> CompressReport:
    """Plain model -> DFloat11 model, atomically; ``begin`` is the ``time.perf_counter()`` of the start."""
    headers = check_plain(tree)
    entries = [e for h in headers.values() for e in h.tensors]
    minimum = int(tree.total_bytes * HOPELESS_RATIO)
    plan = Plan("compress-df11", tree.root, {"units": units}, tree.stamps, tree.total_bytes, minimum)
    with staged(dst, plan, overwrite=overwrite, resume=False) as staging:
        with _advancing(progress, sum(e.nbytes for e in entries), "Compressing") as advance:
            dfloat11.write_directory(
                tree.root, staging.tree, units=units, threads=threads or default_threads(), progress=advance
            )
        sync_files(staging.tree)
        compressed_bytes = tree_bytes(staging.tree)
        stored = sum(header.file_size - header.data_start for header in _headers(staging.tree))
        staging.publish()
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
        weights = sum(_restored_bytes(entry) for header in _headers(src) for entry in header.tensors)
        with _advancing(progress, weights, "Restoring") as advance:
            dfloat11.write_plain(
                src, staging.tree, threads=threads or default_threads(), shapes=shapes, progress=advance
            )
        sync_files(staging.tree)
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
