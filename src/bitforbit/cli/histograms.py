"""Exponent histograms of whole models, for the picture that ``inspect --plot`` draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitforbit.archive.buffers import aligned_buffer, read_exactly
from bitforbit.archive.compressed import is_compressed, open_compressed
from bitforbit.archive.entropy import exponent_histogram
from bitforbit.archive.pipeline import Pipeline
from bitforbit.archive.progress import Progress
from bitforbit.archive.shard_reader import ShardReader
from bitforbit.archive.source import scan
from bitforbit.codecs.base import Bytes
from bitforbit.dtypes import FLOAT_LAYOUTS
from bitforbit.format.header import TensorEntry, read_header

Counts = dict[str, npt.NDArray[np.int64]]


def exponent_counts(path: Path, threads: int, progress: Progress | None) -> Counts:
    """How often each exponent occurs, ``[256]`` by float dtype, in a model directory or file, compressed or not."""
    counts: Counts = {}
    for entry, data in _compressed(path, threads, progress) if is_compressed(path) else _plain(path):
        total = counts.setdefault(entry.dtype, np.zeros(256, np.int64))
        total += exponent_histogram(data, entry.dtype)
    return counts


def _counted(entry: TensorEntry) -> bool:
    return entry.dtype in FLOAT_LAYOUTS and entry.elements > 0


def _plain(path: Path) -> Iterator[tuple[TensorEntry, Bytes]]:
    files = (
        [file.location for file in scan(path).files if file.path.endswith(".safetensors")] if path.is_dir() else [path]
    )
    for file in files:
        header = read_header(file)
        with file.open("rb") as stream:
            for entry in filter(_counted, header.by_offset()):
                data = aligned_buffer(entry.nbytes)
                read_exactly(stream.fileno(), data, header.data_start + entry.begin, str(file))
                yield entry, data


def _compressed(path: Path, threads: int, progress: Progress | None) -> Iterator[tuple[TensorEntry, Bytes]]:
    shards = open_compressed(path).open_shards().values()
    entries = [entry for shard in shards for entry in shard.original.tensors]
    pipe = Pipeline(threads, max((entry.nbytes for entry in entries), default=0), progress)
    for shard in shards:
        reader = ShardReader(shard, pipe)
        with reader.opened() as fd:
            for entry in filter(_counted, shard.original.by_offset()):
                data = aligned_buffer(entry.nbytes)
                reader.tensor(fd, entry, data)
                yield entry, data
