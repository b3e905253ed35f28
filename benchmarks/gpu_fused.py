"""Claim: products straight from tiles, beside torch's own product with the same weights in BF16.

The linears of Llama-3.1-8B, those with the same input in one launch, random weights. First the fused product must have
the bits of the plain kernel with the same order of summation. Then all variants that have room for the tokens are
measured in the device's own order, and the chosen one in other orders; calls take turns over more weights than the L2
cache holds, in CUDA graphs. Besides: which orders give the bits of torch's product, where every product occurs twice
with opposite signs, so that all that is left is how sums were rounded.

    python -m benchmarks.gpu_fused [--dry-run] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, same_bits
from benchmarks.gpu_decode import weights
from bitforbit.cuda.fused import linear
from bitforbit.cuda.fused.order import Order
from bitforbit.cuda.fused.plan import VARIANTS, Variant, choose_variant, plan
from bitforbit.cuda.tiles.layout import PARTS, TileLayout
from bitforbit.ops import gpu

CANDIDATES = (
    *VARIANTS,
    Variant(8, 1, 8, 2, 3),
    Variant(8, 1, 16, 2, 1),
    Variant(8, 2, 4, 4, 3),
    Variant(16, 1, 8, 2, 3),
    Variant(16, 2, 4, 4, 2),
    Variant(32, 2, 8, 2, 1),
    Variant(64, 2, 8, 2, 1),
)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Size:
    """What is multiplied."""

    groups: tuple[tuple[str, tuple[int, ...], int], ...]
    tokens: tuple[int, ...]


FULL = Size(
    (
        ("q, k, v", (4096, 1024, 1024), 4096),
        ("o", (4096,), 4096),
        ("gate, up", (14336, 14336), 4096),
        ("down", (4096,), 14336),
        ("LM head", (128256,), 4096),
    ),
    (1, 16, 32, 64),
)
TINY = Size((("tiny", (48, 64), 192),), (3,))


class Weights:
    """A group's matrices, plain and in tiles."""

    def __init__(self, rows: tuple[int, ...], cols: int, device: torch.device, seed: int) -> None:
        self.plain = [weights(count, cols, device, seed + i) for i, count in enumerate(rows)]
        self.parts = []
        for matrix in self.plain:
            parts = gpu.pack_tiles(matrix)
            assert parts is not None, "Gaussian weights get smaller"
            self.parts.append([parts[name] for name in PARTS])

    def group(self, splits: int | None = None) -> linear.Group:
        """As the kernel takes it."""
        matrices = [
            ([(part.data_ptr(), part.numel()) for part in parts], TileLayout(*matrix.shape), 0)
            for matrix, parts in zip(self.plain, self.parts, strict=True)
        ]
        return linear.prepare(gpu.queue_for(self.plain[0].device), matrices, splits)


def fused(group: linear.Group, x: torch.Tensor, workspace: torch.Tensor, variant: Variant | None) -> torch.Tensor:
    """The product, all matrices' outputs one after the other."""
    out = torch.empty(len(x) * sum(group.rows), dtype=x.dtype, device=x.device)
    queue = gpu.queue_for(x.device)
    linear.linear(queue, group, x.data_ptr(), len(x), out.data_ptr(), workspace.data_ptr(), variant)
    return out


def plain(group: linear.Group, matrices: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The same by the kernel that reads BF16."""
    outs = [torch.empty(len(x) * len(matrix), dtype=x.dtype, device=x.device) for matrix in matrices]
    for matrix, out in zip(matrices, outs, strict=True):
        queue = gpu.queue_for(x.device)
        linear.plain(queue, matrix.data_ptr(), len(matrix), group.order, 0, x.data_ptr(), len(x), out.data_ptr())
    return torch.cat(outs)


def same_as_torch(rows: int, cols: int, x: torch.Tensor) -> dict[str, float]:
    """By number of splits, the share of outputs with the bits of torch's product, on inputs that cancel out."""
    half = weights(rows, cols // 2, x.device, 7)
    places = torch.randperm(cols // 2 * 2, generator=torch.Generator().manual_seed(1)).to(x.device)
    matrix, halves = torch.cat([half, half], 1)[:, places], x[:, : cols // 2]
    inputs = torch.cat([halves, -halves], 1)[:, places].contiguous()
    expected, queue = functional.linear(inputs, matrix), gpu.queue_for(x.device)
    shares = {}
    for splits in SPLITS:
        if splits > -(-matrix.shape[1] // 64):
            break
        out, order = torch.empty_like(expected), Order(matrix.shape[1], splits)
        linear.plain(queue, matrix.data_ptr(), rows, order, 0, inputs.data_ptr(), len(x), out.data_ptr())
        shares[str(splits)] = float((out.view(torch.int16) == expected.view(torch.int16)).double().mean())
    return shares


def name_of(variant: Variant) -> str:
    """Its numbers."""
    return "-".join(
        str(getattr(variant, field)) for field in ("tokens", "stripes", "warps", "stages", "blocks", "bulk")
    )


def products(meter: Meter, rows: tuple[int, ...], cols: int, tokens: int) -> dict[str, Any]:
    """Microseconds of one product by way, and the first matrix's shares of outputs equal to torch's by order."""
    nbytes = 11 * sum(rows) * cols // 8
    sets = [Weights(rows, cols, meter.device, 10 * seed) for seed in range(meter.rotations(nbytes))]
    x = weights(tokens, cols, meter.device, 99)
    properties = gpu.queue_for(meter.device).properties
    chosen = choose_variant(tokens, properties)
    fitting = [
        variant
        for one in CANDIDATES
        for variant in (one, replace(one, bulk=1))
        if variant.tokens == chosen.tokens and variant.shared_bytes <= properties.shared_bytes_per_block
    ]

    def measured(splits: int | None, variant: Variant | None) -> float | None:
        groups = [one.group(splits) for one in sets]
        nbytes = plan(rows, groups[0].order, tokens, properties, variant).workspace_bytes
        workspace = torch.zeros(nbytes, dtype=torch.uint8, device=meter.device)
        got, expected = fused(groups[0], x, workspace, variant), plain(groups[0], sets[0].plain, x)
        same_bits(got, expected, f"{variant}, {groups[0].order}")
        return meter.microseconds([_bound(fused, group, x, workspace, variant) for group in groups])

    def torch_linears(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        return [functional.linear(x, matrix) for matrix in matrices]

    order = sets[0].group().order
    result: dict[str, Any] = {"splits": order.splits, "chosen": name_of(chosen)}
    result["bf16_us"] = meter.microseconds([_bound(torch_linears, one.plain) for one in sets])
    result["fused_us"] = measured(None, None)
    result["variants_us"] = {name_of(variant): measured(None, variant) for variant in fitting}
    result["splits_us"] = {str(splits): measured(splits, None) for splits in SPLITS if splits <= -(-cols // 64)}
    result["same_as_torch"] = same_as_torch(rows[0], cols, x)
    return result


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def measure(meter: Meter, size: Size, report: Report) -> None:
    """All of it."""
    found: list[dict[str, Any]] = []
    for name, rows, cols in size.groups:
        for tokens in size.tokens:
            result = report.attempt(
                f"{name}, {tokens} tokens", lambda r=rows, c=cols, t=tokens: products(meter, r, c, t)
            )
            if result is not None:
                found.append({"name": name, "rows": rows, "cols": cols, "tokens": tokens, **result})
            report.put(products=found)


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = []
    for p in result["products"]:
        times = {**p["variants_us"], **{f"{splits} splits": time for splits, time in p["splits_us"].items()}}
        best = min(times, key=lambda name: times[name] or 0.0)
        figures = [gpu_common.cell(time) for time in (p["bf16_us"], p["fused_us"], times[best])]
        closest = max(p["same_as_torch"], key=lambda splits: p["same_as_torch"][splits])
        same = f"{p['same_as_torch'][closest]:.3f} ({closest})"
        rows.append([p["name"], str(p["tokens"]), *figures, best, p["chosen"], str(p["splits"]), same])
    heads = ["linears", "tokens", "bf16, us", "fused, us", "best, us", "which", "chosen", "splits", "same as torch"]
    return table(heads, rows)


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
