"""Sizes, entropies and bounds, tensor by tensor, of compressed and of plain models."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bitforbit.archive.buffers import read_exactly
from bitforbit.archive.compressed import is_compressed, open_compressed
from bitforbit.archive.entropy import coded_kind, entropy, exponent_histogram, shannon_bound
from bitforbit.archive.pipeline import Pipeline, chunks
from bitforbit.archive.progress import Progress
from bitforbit.archive.report import InspectReport, TensorReport
from bitforbit.archive.shard_reader import ShardReader
from bitforbit.archive.shard_writer import Coder, opened
from bitforbit.archive.source import SourceFile, refuse_kind, scan_directory, source_file
from bitforbit.codecs import registry
from bitforbit.codecs.base import Bytes
from bitforbit.dtypes import FLOAT_LAYOUTS
from bitforbit.errors import SourceNotFoundError
from bitforbit.format.header import Header, TensorEntry, read_header
from bitforbit.format.layout import Shard
from bitforbit.format.spec import RAW_CODEC, SHARD_SUFFIX


def inspect(
    path: str | Path, *, threads: int | None = None, progress: Progress | None = None, forecast: bool = True
) -> InspectReport:
    """Look at a model directory or a .safetensors file, compressed or not; nothing is written.

    Compressed tensors are decoded to count their exponents. Of a plain model every tensor is coded in memory, one at
    a time, to forecast its size; ``forecast=False`` leaves that out.

    Raises SourceNotFoundError, PickleRefusedError, GgufRefusedError or a FormatError.
    """
    begin = time.perf_counter()
    path = Path(path)
    if not path.exists():
        raise SourceNotFoundError(f"{path}: expected a model directory or a .safetensors file, got nothing")
    if is_compressed(path):
        model = open_compressed(path)
        shards = list(model.open_shards().items())
        file_bytes = sum(model.locate(entry).size for entry in model.files)
        pipe = _pipeline((shard.original for _, shard in shards), threads, progress)
        results = pipe.run(lambda item: _inspect_shard(*item, pipe), shards)
    else:
        files = _plain_files(path)
        headers = [read_header(file.location) for file in files]
        file_bytes = sum(file.size for file in files)
        pipe = _pipeline(headers, threads, progress)
        plain = list(zip(files, headers, strict=True))
        results = pipe.run(lambda item: _inspect_plain(*item, pipe, forecast), plain)
    pipe.progress.finish()
    tensors = [tensor for result in results for tensor in result]
    return InspectReport(
        path=str(path),
        compressed=is_compressed(path),
        file_bytes=file_bytes,
        seconds=time.perf_counter() - begin,
        total=_total(tensors),
        tensors=tensors,
    )


def _pipeline(headers: Iterable[Header], threads: int | None, progress: Progress | None) -> Pipeline:
    sizes = [entry.nbytes for header in headers for entry in header.tensors]
    pipe = Pipeline(threads, max(sizes, default=0), progress)
    pipe.progress.start(sum(sizes), "Inspecting")
    return pipe


def _plain_files(path: Path) -> Sequence[SourceFile]:
    if path.is_dir():
        tree = scan_directory(path)
        files = [file for file in tree.files if file.path.endswith(SHARD_SUFFIX)]
        names = [file.path for file in tree.files]
    else:
        files = [source_file(path)] if path.name.endswith(SHARD_SUFFIX) else []
        names = [path.name]
    if not files:
        refuse_kind(path, names)
        raise SourceNotFoundError(f"{path}: expected .safetensors files, got none")
    return files


def _inspect_shard(path: str, shard: Shard, pipe: Pipeline) -> list[TensorReport]:
    reader = ShardReader(shard, pipe)
    result: dict[str, TensorReport] = {}
    with reader.opened() as fd:
        for entry in shard.original.by_offset():
            with pipe.lease(entry.nbytes) as lease:
                reader.tensor(fd, entry, lease.data)
                codec = shard.record.tensors[entry.name].codec
                result[entry.name] = _report(entry, path, lease.data, shard.stored_bytes(entry), codec)
            pipe.progress.advance(entry.nbytes)
    return [result[entry.name] for entry in shard.original.tensors]


def _inspect_plain(file: SourceFile, header: Header, pipe: Pipeline, forecast: bool) -> list[TensorReport]:
    coder = Coder(header, registry.get("planes", 1), lambda name: True, pipe)
    result: dict[str, TensorReport] = {}

    def look(entry: TensorEntry, data: Bytes) -> None:
        stored: int | None = None
        codec: str | None = None
        if forecast:
            with pipe.coded.hold(entry.nbytes):
                coded = coder.encode(entry, data)
                stored, codec = (entry.nbytes, RAW_CODEC) if coded is None else (coded.nbytes, coded.codec)
        result[entry.name] = _report(entry, file.path, data, stored, codec)

    with opened(file) as fd:
        for group in chunks(header.by_offset()):
            begin, end = group[0].begin, group[-1].end
            with pipe.lease(end - begin) as lease:
                read_exactly(fd, lease.data, header.data_start + begin, str(file.location))
                for entry in group:
                    look(entry, lease.data[entry.begin - begin : entry.end - begin])
            pipe.progress.advance(end - begin)
    return [result[entry.name] for entry in header.tensors]


def _report(entry: TensorEntry, file: str, data: Bytes, stored: int | None, codec: str | None) -> TensorReport:
    counted = entry.dtype in FLOAT_LAYOUTS and entry.elements > 0
    exponents = entropy(exponent_histogram(data, entry.dtype)) if counted else None
    bound = None if exponents is None else shannon_bound(exponents, coded_kind(data, entry.dtype))
    rate = None if stored is None or entry.elements == 0 else 8 * stored / entry.elements
    distance = None if rate is None or bound is None else rate - bound
    return TensorReport(
        entry.name,
        file,
        entry.dtype,
        list(entry.shape),
        entry.elements,
        entry.nbytes,
        stored,
        rate,
        exponents,
        bound,
        distance,
        codec,
    )


def _total(tensors: Sequence[TensorReport]) -> TensorReport:
    elements = sum(t.elements for t in tensors)
    stored = sum(t.stored_bytes or 0 for t in tensors) if all(t.stored_bytes is not None for t in tensors) else None

    def mean(values: Iterable[tuple[float | None, int]]) -> float | None:
        known = [(value, weight) for value, weight in values if value is not None]
        weight = sum(w for _, w in known)
        return sum(v * w for v, w in known) / weight if weight else None

    return TensorReport(
        name="total",
        file="",
        dtype=", ".join(sorted({t.dtype for t in tensors})),
        shape=[],
        elements=elements,
        original_bytes=sum(t.original_bytes for t in tensors),
        stored_bytes=stored,
        bits_per_weight=8 * stored / elements if stored is not None and elements else None,
        exponent_entropy=mean((t.exponent_entropy, t.elements) for t in tensors),
        shannon_bound=mean((t.shannon_bound, t.elements) for t in tensors),
        distance=mean((t.distance, t.elements) for t in tensors),
        codec=", ".join(sorted({t.codec for t in tensors if t.codec is not None})) or None,
    )
