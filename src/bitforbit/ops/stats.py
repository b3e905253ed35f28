"""How the linears of this process were computed: counts, and the bytes of the weights (uncompressed) they stand for."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("fused_exact", "fused", "decoded")
"""A product proven to have torch's bits; a product in the order of ``mode="fused"``; decoded, then torch's product."""


@dataclass
class Count:
    """Linears computed in one way."""

    linears: int = 0
    weight_bytes: int = 0


_counts = {way: Count() for way in WAYS}


def count(way: str, weight_bytes: int) -> None:
    """Count one linear. Threads that count at once may lose a count: this is for reports."""
    entry = _counts[way]
    entry.linears += 1
    entry.weight_bytes += weight_bytes


def snapshot() -> dict[str, Count]:
    """Counts since the start or the last :func:`reset`, by way."""
    return {way: Count(entry.linears, entry.weight_bytes) for way, entry in _counts.items()}


def reset() -> None:
    """Start counting from zero."""
    for way in WAYS:
        _counts[way] = Count()
