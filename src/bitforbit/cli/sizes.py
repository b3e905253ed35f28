"""Sizes that ``--json`` adds to what the archive reports. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bitforbit.archive.compressed import open_compressed
from bitforbit.archive.source import scan
from bitforbit.errors import BitforbitError
from bitforbit.format.header import Header, read_header


def bits_per_weight(compressed: Path, restored: Path) -> float | None:
    """Bits that each weight of the plain model ``restored`` takes in ``compressed``; None if there are no weights."""
    elements = sum(entry.elements for header in _headers(restored) for entry in header.tensors)
    stored = sum(header.file_size - header.data_start for header in _headers(compressed))
    return 8 * stored / elements if elements else None


def stored_sizes(path: Path) -> dict[str, float | None]:
    """``compressed_bytes`` and ``bits_per_weight`` of a compressed model; None where damage hides them."""
    try:
        model = open_compressed(path)
        total = sum(model.locate(entry).size for entry in model.files)
        weights = [
            (shard.stored_bytes(e), e.elements)
            for shard in model.open_shards().values()
            for e in shard.original.tensors
        ]
    except (BitforbitError, OSError):
        return {"compressed_bytes": None, "bits_per_weight": None}
    elements = sum(n for _, n in weights)
    rate = 8 * sum(size for size, _ in weights) / elements if elements else None
    return {"compressed_bytes": total, "bits_per_weight": rate}


def _headers(path: Path) -> Iterator[Header]:
    if not path.is_dir():
        yield read_header(path)
        return
    for file in scan(path).files:
        if file.path.endswith(".safetensors"):
            yield read_header(file.location)
