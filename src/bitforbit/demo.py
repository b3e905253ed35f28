"""A demonstration on a real model: the small Llama that the package carries, compressed.

It is restored, compressed with every format, restored from each, and compared: files by SHA-256, and tensors too where
a format (DFloat11) does not keep files. Every figure is measured while it runs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitforbit import dtypes
from bitforbit.archive import CompressReport, Progress, compress, decompress
from bitforbit.archive.source import scan
from bitforbit.arrays import encode
from bitforbit.cpu import default_threads
from bitforbit.errors import DestinationExistsError, SourceNotFoundError
from bitforbit.format.header import read_header

FORMATS = ("planes", "df11")

_REPEATS = 3
_PACKAGED = Path(__file__).parent / "data" / "demo_model"


@dataclass(frozen=True)
class FormatResult:
    """One format's figures. Sizes in bytes, weights without file headers; speeds in GB of original files per second.

    exact tells whether everything that the format keeps came back: all files for planes, all tensors for df11.
    """

    format: str
    weight_bytes: int
    percent_of_original: float
    bits_per_weight: float
    compressed_bytes: int
    compress_seconds: float
    decompress_seconds: float
    compress_gb_per_second: float
    decompress_gb_per_second: float
    files: int
    equal_files: int
    tensors: int
    equal_tensors: int
    exact: bool


@dataclass(frozen=True)
class MemoryResult:
    """Speed of coding all tensors from memory to memory, best of three, in GB of original weights per second."""

    threads: int
    encode_gb_per_second: float
    decode_gb_per_second: float


@dataclass(frozen=True)
class DemoReport:
    """Result of :func:`run`. facts is the model's training_report.json; restored files had the recorded SHA-256."""

    model: str
    facts: dict[str, Any]
    files: int
    shipped_bytes: int
    original_bytes: int
    original_weight_bytes: int
    formats: list[FormatResult]
    memory: MemoryResult
    exact: bool
    kept: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Every field, as a dictionary that the json module can write."""
        return asdict(self)


def model_path(path: Path | None = None) -> Path:
    """Where the packaged model is, or ``path`` instead. Raises SourceNotFoundError if it is not there."""
    found = _PACKAGED if path is None else path
    if not found.is_dir():
        raise SourceNotFoundError(
            f"{found}: expected the demonstration model, got nothing; this installation came without it, so reinstall "
            "bitforbit, or try a model of your own: bitforbit compress SRC DST"
        )
    return found


def run(
    model: Path | None = None,
    *,
    formats: Sequence[str] | None = None,
    keep: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DemoReport:
    """Run the demonstration in a temporary directory, or in the new directory ``keep``, which then stays.

    Raises SourceNotFoundError, DestinationExistsError, or a FormatError if the packaged model is damaged.
    """
    begin = time.perf_counter()
    source, count = model_path(model), threads or default_threads()
    with ExitStack() as stack:
        if keep is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitforbit-demo-")))
        else:
            work = keep
            if work.exists() and (not work.is_dir() or any(work.iterdir())):
                raise DestinationExistsError(f"{work}: exists already; choose a new directory for --keep")
            work.mkdir(parents=True, exist_ok=True)
        original = work / "original"
        decompress(source, original, threads=count, sha256=True, progress=progress)
        reference = _Fingerprint.of(original)
        results = [_measure(name, original, reference, work, count, progress) for name in formats or FORMATS]
        report = original / "training_report.json"
        return DemoReport(
            model=str(source),
            facts=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {},
            files=len(reference.files),
            shipped_bytes=scan(source).total_bytes,
            original_bytes=scan(original).total_bytes,
            original_weight_bytes=reference.weight_bytes,
            formats=results,
            memory=_measure_memory(original, count),
            exact=all(result.exact for result in results),
            kept=None if keep is None else str(keep),
            seconds=time.perf_counter() - begin,
        )


@dataclass(frozen=True)
class _Fingerprint:
    """SHA-256 of every file by path, and dtype, shape and SHA-256 of every tensor by name."""

    files: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], str]]
    weight_bytes: int

    @classmethod
    def of(cls, directory: Path) -> _Fingerprint:
        files = {file.path: hashlib.sha256(file.location.read_bytes()).hexdigest() for file in scan(directory).files}
        arrays = _arrays(directory)
        tensors = {
            name: (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
            for name, array in arrays.items()
        }
        return cls(files, tensors, sum(array.nbytes for array in arrays.values()))


def _arrays(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    for file in scan(directory).files:
        if file.path.endswith(".safetensors"):
            header, data = read_header(file.location), file.location.read_bytes()
            for entry in header.tensors:
                at = header.data_start + entry.begin
                flat = np.frombuffer(data, np.uint8, entry.nbytes, at).view(dtypes.to_numpy(entry.dtype))
                arrays[entry.name] = flat.reshape(entry.shape)
    return arrays


def _measure(
    name: str, original: Path, reference: _Fingerprint, work: Path, threads: int, progress: Progress | None
) -> FormatResult:
    compressed, restored = work / name, work / f"{name}-restored"
    written: CompressReport = compress(original, compressed, format=name, threads=threads, progress=progress)  # type: ignore[arg-type]
    back = decompress(compressed, restored, threads=threads, progress=progress)
    got = _Fingerprint.of(restored)
    equal_files = sum(got.files.get(path) == digest for path, digest in reference.files.items())
    equal_tensors = sum(got.tensors.get(key) == value for key, value in reference.tensors.items())
    all_tensors = equal_tensors == len(reference.tensors) == len(got.tensors)
    return FormatResult(
        format=name,
        weight_bytes=written.weight_compressed_bytes,
        percent_of_original=100 * written.weight_compressed_bytes / written.weight_original_bytes,
        bits_per_weight=written.bits_per_weight,
        compressed_bytes=written.compressed_bytes,
        compress_seconds=written.seconds,
        decompress_seconds=back.seconds,
        compress_gb_per_second=written.original_bytes / written.seconds / 1e9,
        decompress_gb_per_second=back.restored_bytes / back.seconds / 1e9,
        files=len(reference.files),
        equal_files=equal_files,
        tensors=len(reference.tensors),
        equal_tensors=equal_tensors,
        exact=all_tensors and (name == "df11" or got.files == reference.files),
    )


def _measure_memory(original: Path, threads: int) -> MemoryResult:
    arrays = _arrays(original)
    total = sum(array.nbytes for array in arrays.values())
    encode_seconds, decode_seconds = [], []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        coded = [encode(array, threads) for array in arrays.values()]
        middle = time.perf_counter()
        for encoded, array in zip(coded, arrays.values(), strict=True):
            encoded.decode(out=np.empty_like(array), threads=threads)
        decode_seconds.append(time.perf_counter() - middle)
        encode_seconds.append(middle - begin)
    return MemoryResult(threads, total / min(encode_seconds) / 1e9, total / min(decode_seconds) / 1e9)
