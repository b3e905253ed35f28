"""Tables of the benchmarks of models that do not fit: the CPU's (:mod:`benchmarks.offload`) and the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import table

Result = dict[str, Any]
NOT_MEASURED = "not measured"
FIRST = "accelerate BF16"
"""What the other ways are compared with."""
WAYS = (FIRST, "streamed BF16", "accelerate exact", "streamed exact")
ENDS = (WAYS[0], WAYS[-1])


def cpu(result: Result, where: Callable[[Result], str]) -> str:
    """Tokens per second by memory for weights and by way."""
    rows = []
    for budget in result["budgets"]:
        ways = budget["ways"]
        first = ways[FIRST].get("tokens_per_second")
        cells = [_speed(ways.get(way, {}), first if way != FIRST else None) for way in WAYS]
        read = [f"{ways[way]['bytes_per_token'] / 1e9:.2f}" if "blocks" in ways.get(way, {}) else "-" for way in ENDS]
        rows.append([f"{budget['bytes'] / 1e9:.2f} GB", *cells, " / ".join(read)])
    size, inside = result["model"], result["in_memory"]
    disk = result["disk_bytes_per_second"]
    limit = "enforced by a cgroup, " if result["limited"] else ""
    speed = f" ({disk / 1e9:.1f} GB/s for one reader)" if disk else ""
    intro = (
        f"Llama with {size['layers']} layers of Llama-3.2-3B's shape (random weights), "
        f"{result['plain_bytes'] / 1e9:.2f} GB in BF16, {result['compressed_bytes'] / 1e9:.2f} GB compressed; tokens/s "
        f"with so much memory for weights, {limit}the rest read from disk{speed} for every token. Same tokens and same "
        f"bits of logits everywhere; all in memory BF16 makes {inside['tokens_per_second']:.2f} tokens/s."
    )
    headers = ["memory", f"{FIRST} + transformers", *WAYS[1:], "GB read per token, first / last"]
    return "\n".join([intro, "", table(headers, rows), "", where(result)])


def _speed(way: Result, first: float | None) -> str:
    if "error" in way:
        return "out of memory"
    speed = way.get("tokens_per_second")
    if speed is None:
        return NOT_MEASURED
    return f"{speed:.2f}" + (f" ({speed / first:.1f}x)" if first else "")


def gpu(result: Result) -> list[str]:
    """Lines of the GPU's tables; one if nothing was measured."""
    ways = [line for line in result.get("ways", ()) if line["step_ms"]]
    if not ways:
        return [f"Models that do not fit on the GPU: {NOT_MEASURED}."]
    rows = []
    for line in ways:
        first = [each["step_ms"] for each in ways if (each["share"], each["way"]) == (line["share"], FIRST)]
        ratio = f"{first[0] / line['step_ms']:.2f}x" if first else NOT_MEASURED
        link = (
            NOT_MEASURED if line["of_copy"] is None else f"{line['gb_per_s']:.0f} GB/s, {100 * line['of_copy']:.0f} %"
        )
        rows.append(
            [
                f"{line['budget_bytes'] / 1e9:.1f} GB",
                line["way"],
                f"{line['resident_layers']} of {line['layers']}",
                f"{line['link_bytes'] / 1e9:.2f} GB",
                f"{1000 / line['step_ms']:.2f}",
                ratio,
                link,
            ]
        )
    copy = result["copy_gb_per_s"]
    intro = (
        f"A model that does not fit: {result['layers']} of those layers, {result['bf16_bytes'] / 1e9:.1f} GB in BF16, "
        "with so much of the GPU's memory for weights; the last layers come from host memory for every token. In the "
        f"last column the rate over the link, and its share of a copy's{f' ({copy:.0f} GB/s)' if copy else ''}."
    )
    headers = ["memory", "", "layers kept", "over the link", "tokens/s", f"/ {FIRST}", "link"]
    return [intro, "", table(headers, rows)]
