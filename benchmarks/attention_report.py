"""Tables of block-sparse attention and of the I/O model's benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import table

Result = dict[str, Any]


def block_sparse(result: Result, where: Callable[[Result], str]) -> str:
    """Share of blocks, words and time by pattern."""
    rows = [
        [
            f"{case['tokens']:,}",
            case["pattern"],
            f"{case['kept']:.3f}",
            f"{case['words'] / dense['words']:.3f}",
            f"{case['of_dense']:.3f}",
            f"{case['of_dense'] / case['kept']:.2f}",
        ]
        for case in result["cases"]
        if case["pattern"] != "dense"
        for dense in result["cases"]
        if dense["pattern"] == "dense" and dense["tokens"] == case["tokens"]
    ]
    q, kv, channels = result["heads"]
    return "\n".join(
        [
            f"Causal prefill in BF16, {q} query heads on {kv} KV heads of {channels} channels, blocks of "
            f"{result['block']}, {result['threads']} threads, against SDPA, choosing the blocks included:",
            "",
            table(["tokens", "pattern", "blocks kept", "words moved", "time", "time / blocks"], rows),
            "",
            where(result),
        ]
    )


def io_attention(result: Result, where: Callable[[Result], str]) -> str:
    """Both orders of tiles by size, and predicted against measured bytes."""
    cases = result["attention"]
    rows = []
    for key in dict.fromkeys((case["isa"], case["n"], case["d"]) for case in cases):
        own = [case for case in cases if (case["isa"], case["n"], case["d"]) == key]
        first = next(case for case in own if case["order"] == "flash")
        cells = [key[0], f"{key[1]:,} x {key[2]}"]
        for order, level in (("flash", "L1"), ("flash", "L2"), ("square", "L1")):
            fitting = [case for case in own if case["order"] == order and case["held_by"] == level]
            best = min(fitting, key=lambda case: float(case["seconds"]), default=None)
            if best is None:
                cells.append("none fits")
            else:
                cells.append(
                    f"{best['seconds'] / first['seconds']:.2f} ({best['rows']} rows, {best['words'] / 1e6:.0f} M)"
                )
        rows.append(cells)
    headers = ["kernels", "tokens x channels", "flash, tiles in L1", "flash, tiles in L2", "square, tiles in L1"]
    return "\n".join(
        [
            "One head in FP32, one thread: time of the fastest tile of a kind, relative to FlashAttention-2's order "
            "with 4 rows; in brackets its rows and the words (millions) that the model has it move:",
            "",
            table(headers, rows),
            "",
            f"One-token products and reads of a cache, {len(result['bytes'])} sizes from 1 to 117 MB: predicted and "
            f"measured times have a rank correlation of {result['bytes_and_time']:.3f}.",
            "",
            where(result),
        ]
    )
