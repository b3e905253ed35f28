"""What the archive functions return. Sizes in bytes, times in seconds; ``to_json`` gives JSON-able dictionaries."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitforbit.archive.source import SourceFile, missing_files
from bitforbit.format.layout import Shard


@dataclass(frozen=True)
class _Report:
    def to_json(self) -> dict[str, Any]:
        """Every field, as a dictionary that the json module can write."""
        return asdict(self)


@dataclass(frozen=True)
class CompressReport(_Report):
    """Result of ``compress``.

    original_bytes and compressed_bytes count all files, the manifest included. weight_original_bytes and
    weight_compressed_bytes count the tensors of all shards: parts with their padding, and uncompressed tensors, but
    no headers. bits_per_weight is 8 x weight_compressed_bytes / elements. resumed_files were taken over from an
    unfinished run. For format "df11" the counts of single tensors are those of the stored tensors' bytes only.
    ``part`` (i, n) counts the files of that part only; remaining_files of all parts are not finished yet.
    missing_files are named by an index of the source, but not there: what was compressed may be an incomplete download.
    """

    source: str
    destination: str
    format: str
    original_bytes: int
    compressed_bytes: int
    weight_original_bytes: int
    weight_compressed_bytes: int
    elements: int
    bits_per_weight: float
    files: int
    shards: int
    tensors: int
    compressed_tensors: int
    resumed_files: int
    seconds: float
    part: tuple[int, int] | None = None
    remaining_files: int = 0
    missing_files: list[str] = field(default_factory=list)


def compress_report(
    src: Path,
    dst: Path,
    files: Sequence[SourceFile],
    shards: Collection[Shard],
    compressed_bytes: int,
    resumed: int,
    begin: float,
    part: tuple[int, int] | None = None,
    remaining: int = 0,
) -> CompressReport:
    """Count; ``files`` and ``shards`` are those of this run, ``begin`` its ``time.perf_counter()``."""
    weights = [(shard.stored_bytes(e), e) for shard in shards for e in shard.original.tensors]
    stored = sum(size for size, _ in weights)
    elements = sum(e.elements for _, e in weights)
    return CompressReport(
        source=str(src),
        destination=str(dst),
        format="planes",
        original_bytes=sum(file.size for file in files),
        compressed_bytes=compressed_bytes,
        weight_original_bytes=sum(e.nbytes for _, e in weights),
        weight_compressed_bytes=stored,
        elements=elements,
        bits_per_weight=8 * stored / elements if elements else 0.0,
        files=len(files),
        shards=len(shards),
        tensors=len(weights),
        compressed_tensors=sum(shard.compressed_tensors for shard in shards),
        resumed_files=resumed,
        seconds=time.perf_counter() - begin,
        part=part,
        remaining_files=remaining,
        missing_files=missing_files(files) if part is None else [],
    )


@dataclass(frozen=True)
class DecompressReport(_Report):
    """Result of ``decompress``; sha256 tells whether SHA-256 was checked besides the XXH3 checksums."""

    source: str
    destination: str
    format: str
    compressed_bytes: int
    restored_bytes: int
    files: int
    shards: int
    tensors: int
    resumed_files: int
    sha256: bool
    seconds: float


@dataclass(frozen=True)
class Failure(_Report):
    """One thing that is not as it should be: the file, the tensor if it is one, the error's class and message."""

    path: str
    tensor: str | None
    error: str
    message: str


@dataclass(frozen=True)
class VerifyReport(_Report):
    """Result of ``verify``. unknown_files lie in the directory but are not named by the manifest."""

    path: str
    against: str | None
    ok: bool
    files: int
    tensors: int
    restored_bytes: int
    seconds: float
    errors: list[Failure] = field(default_factory=list)
    unknown_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TensorReport(_Report):
    """One tensor, or several together.

    codec is "raw" where the tensor is stored as it is, None where stored_bytes (None too) was not asked for.
    exponent_entropy in bits per element, shannon_bound = exponent_entropy + the bits besides the exponent,
    distance = bits_per_weight - shannon_bound; None for dtypes without an exponent and for empty tensors.
    """

    name: str
    file: str
    dtype: str
    shape: list[int]
    elements: int
    original_bytes: int
    stored_bytes: int | None
    bits_per_weight: float | None
    exponent_entropy: float | None
    shannon_bound: float | None
    distance: float | None
    codec: str | None


@dataclass(frozen=True)
class InspectReport(_Report):
    """Result of ``inspect``.

    compressed tells whether the files are compressed already; if not, stored sizes are a forecast. The total sums
    sizes over all tensors; its entropy and bound are means over the elements of the tensors that have them, and so is
    its distance.
    """

    path: str
    compressed: bool
    file_bytes: int
    seconds: float
    total: TensorReport
    tensors: list[TensorReport] = field(default_factory=list)
