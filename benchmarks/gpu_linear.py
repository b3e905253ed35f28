"""Claim: what exact mode costs in a single linear, beside torch's own product with the same weight in BF16.

The linears of Llama-3.1-8B at several numbers of tokens, random weights. Outputs are compared bit for bit first. Both
sides take turns over more weights than the L2 cache holds, in CUDA graphs; exact mode under two policies: each weight
decoded right before its product, and the next one decoded beside it.

    python -m benchmarks.gpu_linear [--dry-run] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, same_bits
from benchmarks.gpu_decode import weights
from bitforbit.ops import gpu
from bitforbit.ops.gpu import Policy

POLICIES = {"exact, at use": Policy(ahead=0), "exact, ahead": Policy()}
MIN_WEIGHTS = 3
"""Fewer would let a weight meet itself when it is decoded ahead."""


@dataclass(frozen=True)
class Size:
    """What is multiplied."""

    matrices: tuple[tuple[str, int, int], ...]
    tokens: tuple[int, ...]


FULL = Size(
    (
        ("k, v", 1024, 4096),
        ("q, o", 4096, 4096),
        ("gate, up", 14336, 4096),
        ("down", 4096, 14336),
        ("LM head", 128256, 4096),
    ),
    (1, 8, 32, 64, 128),
)
TINY = Size((("tiny", 48, 128),), (1, 3))


def linears(meter: Meter, rows: int, cols: int, tokens: int) -> dict[str, float | None]:
    """Microseconds of one product, by way."""
    count = max(MIN_WEIGHTS, meter.rotations(rows * cols))
    plain = [weights(rows, cols, meter.device, seed) for seed in range(count)]
    packed = []
    for matrix in plain:
        parts = gpu.pack_tiles(matrix)
        assert parts is not None, "Gaussian weights get smaller"
        packed.append(tuple(parts.values()))
    x = weights(tokens, cols, meter.device, 99)
    linear = torch.ops.bitforbit.tiles_linear

    def product(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return linear(x, *parts, None, rows, cols, "exact")

    result = {"bf16": meter.microseconds([_bound(functional.linear, x, matrix) for matrix in plain])}
    for name, policy in POLICIES.items():
        gpu.clear()
        with gpu.use_policy(policy), torch.inference_mode():
            for matrix, parts in zip(plain, packed, strict=True):
                same_bits(product(parts), functional.linear(x, matrix), f"{name}, {tokens} tokens")
            result[name] = meter.microseconds([_bound(product, parts) for parts in packed])
    return result


def _bound(function: Callable[..., torch.Tensor], *arguments: Any) -> Callable[[], torch.Tensor]:
    return lambda: function(*arguments)


def measure(meter: Meter, size: Size, report: Report) -> None:
    """All of it."""
    products: list[dict[str, Any]] = []
    for name, rows, cols in size.matrices:
        for tokens in size.tokens:
            found = report.attempt(f"{name}, {tokens} tokens", lambda r=rows, c=cols, t=tokens: linears(meter, r, c, t))
            if found is not None:
                products.append({"name": name, "rows": rows, "cols": cols, "tokens": tokens, "us": found})
            report.put(products=products)


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    names = ("bf16", *POLICIES)
    rows = [
        [p["name"], f"{p['rows']} x {p['cols']}", str(p["tokens"]), *(gpu_common.cell(p["us"][name]) for name in names)]
        for p in result["products"]
    ]
    return table(["linear", "shape", "tokens", *(f"{name}, us" for name in names)], rows)


def main(arguments: list[str]) -> int:
    """Measure and print."""
    chosen = gpu_common.parser(__doc__).parse_args(arguments)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        measure(meter, TINY if chosen.dry_run else FULL, report)
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
