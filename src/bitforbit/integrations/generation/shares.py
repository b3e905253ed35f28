"""How the products with compressed weights ran: fused in torch's own order, fused in ours, or decoded first."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("fused_exact", "fused", "decoded")


@dataclass(frozen=True)
class Shares:
    """Calls of linears, and bytes of weights (as BF16) that they multiplied by, for each of :data:`WAYS`."""

    linears: dict[str, int]
    weight_bytes: dict[str, int]

    def share_of_linears(self, way: str) -> float | None:
        """0 to 1; None if no linear ran."""
        return _share(self.linears, way)

    def share_of_bytes(self, way: str) -> float | None:
        """0 to 1; None if no linear ran."""
        return _share(self.weight_bytes, way)

    def to_json(self) -> dict[str, dict[str, float]]:
        """Counts and shares."""
        return {
            "linears": dict(self.linears),
            "weight_bytes": dict(self.weight_bytes),
            "linears_share": {way: share for way in WAYS if (share := self.share_of_linears(way)) is not None},
            "weight_bytes_share": {way: share for way in WAYS if (share := self.share_of_bytes(way)) is not None},
        }


def _share(counts: dict[str, int], way: str) -> float | None:
    total = sum(counts.values())
    return counts[way] / total if total else None


def reset() -> None:
    """Count from zero."""
    from bitforbit.ops import stats

    stats.reset()


def collect() -> Shares:
    """What ran since the last :func:`reset`."""
    from bitforbit.ops import stats

    counts = stats.snapshot()
    return Shares(
        {way: counts[way].linears for way in WAYS},
        {way: counts[way].weight_bytes for way in WAYS},
    )
