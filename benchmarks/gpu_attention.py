"""Claims of FlashAttention (arXiv 2205.14135) on this GPU: fused attention is faster, its memory linear, sparsity pays.

Three measurements. GPT-2's attention at 1024 tokens, forward and with the backward pass: scores in memory (matmul,
softmax, matmul) against SDPA's flash kernel. Peak memory of both from 1024 tokens on. Block-sparse causal attention
(flex_attention over our layouts) against SDPA's flash kernel, by the share of blocks kept. Before anything is timed:
each is as close to FP64 as torch's own attention in the same dtype, within a factor of two.

    python -m benchmarks.gpu_attention [--dry-run] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_common
from benchmarks.common import table
from benchmarks.gpu_common import Meter, Report, cell
from bitforbit.attention import block_sparse, naive, patterns
from bitforbit.attention.grid import Grid
from bitforbit.attention.tiles import Tiles, layout_mask

DENSITIES = (1.0, 0.5, 0.25, 0.125)
PATTERNS = ("local_global", "topk")


@dataclass(frozen=True)
class Size:
    """What is attended to."""

    gpt2: tuple[int, int, int, int]
    """Batch, heads, tokens, channels."""
    memory_tokens: tuple[int, ...]
    sparse: tuple[int, int, int, int]
    """Query heads, KV heads, tokens, channels."""
    gate_tokens: int
    block: int
    dtype: torch.dtype


FULL = Size((16, 16, 1024, 64), (1024, 2048, 4096, 8192), (32, 8, 16384, 128), 1024, 128, torch.bfloat16)
TINY = Size((1, 2, 64, 16), (32, 64), (4, 2, 128, 16), 96, 16, torch.bfloat16)


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with scores and weights in memory, in the dtype of the inputs."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash kernel, and no other."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"materialised": materialised, "fused": fused}


def make(sizes: tuple[int, int, int, int], size: Size, meter: Meter, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v."""
    heads, kv_heads, tokens, dim = sizes
    generator = torch.Generator(meter.device).manual_seed(0)
    shapes = ((batch, count, tokens, dim) for count in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(*shape, generator=generator, device=meter.device).to(size.dtype) for shape in shapes)
    return q, k, v


def check_close(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Raise AssertionError if ``got`` is more than twice as far from the exact result as the plain one."""
    ours, theirs = (float((x - exact).abs().max()) for x in (got, plain))
    if not ours <= 2 * theirs:
        raise AssertionError(f"{what}: off by {ours:.3g}, torch by {theirs:.3g}")


def gate(size: Size, meter: Meter) -> None:
    """Everything that is timed later, at few tokens."""
    heads, kv_heads, _, dim = size.sparse
    tokens = size.gate_tokens
    q, k, v = make((heads, heads, tokens, dim), size, meter)
    check_close(fused(q, k, v), materialised(q, k, v), naive.attention(q, k, v, causal=True)[0], "fused")
    q, k, v = make((heads, kv_heads, tokens, dim), size, meter)
    grid = Grid(tokens, tokens, size.block)
    causal = naive.visible(tokens, tokens, True, device=q.device)
    for pattern in PATTERNS:
        layout = patterns.with_density(pattern, grid, 0.5, q, k)
        per_head = layout if layout.shape[1] == 1 else layout.repeat_interleave(heads // kv_heads, 1)
        mask = layout_mask(per_head, Tiles(size.block, size.block), tokens, tokens) & causal
        plain = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        got = block_sparse.attention(q, k, v, layout, grid)
        check_close(got, plain, naive.attention(q, k, v, mask=mask)[0], pattern)


def gpt2(size: Size, meter: Meter) -> dict[str, Any]:
    """Microseconds of one layer's attention, forward, and with the backward pass."""
    batch, heads, tokens, dim = size.gpt2
    q, k, v = make((heads, heads, tokens, dim), size, meter, batch)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    result: dict[str, Any] = {"batch": batch, "heads": heads, "tokens": tokens, "dim": dim}
    for name, function in ATTENTIONS.items():

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(q, k, v)

        def both(function: Callable[..., Tensor] = function) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(q, k, v).sum(), (q, k, v))

        result[name] = {
            "forward_us": meter.eager_microseconds(forward, 15),
            "forward_backward_us": meter.eager_microseconds(both, 15),
        }
    return result


def memory(size: Size, meter: Meter) -> list[dict[str, Any]]:
    """Peak bytes beyond the inputs, by number of tokens; a call that runs out of memory has none."""
    found = []
    for tokens in size.memory_tokens:
        entry: dict[str, Any] = {"tokens": tokens}
        q, k, v = make((size.gpt2[1], size.gpt2[1], tokens, size.gpt2[3]), size, meter)
        for name, function in ATTENTIONS.items():
            if meter.measures:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            function(q, k, v)
            entry[name] = torch.cuda.max_memory_allocated() - before if meter.measures else None
        found.append(entry)
    return found


def sparse(size: Size, meter: Meter) -> list[dict[str, Any]]:
    """Microseconds by pattern and density, beside SDPA's flash kernel; the choice of blocks is timed on its own."""
    q, k, v = make(size.sparse, size, meter)
    grid = Grid(q.shape[2], q.shape[2], size.block)
    dense = meter.eager_microseconds(lambda: fused(q, k, v), 15)
    found: list[dict[str, Any]] = [{"pattern": "dense", "kept": 1.0, "us": dense, "layout_us": None}]
    for pattern in PATTERNS:
        for density in DENSITIES:

            def choose(pattern: str = pattern, density: float = density) -> Tensor:
                return patterns.with_density(pattern, grid, density, q, k)

            layout = choose()
            call = lambda layout=layout: block_sparse.attention(  # noqa: E731
                q, k, v, layout, grid, backend="flex" if meter.measures else None
            )
            entry = {"pattern": pattern, "density": density, "kept": grid.density(layout)}
            entry |= {"us": meter.eager_microseconds(call, 15), "layout_us": meter.eager_microseconds(choose, 15)}
            found.append(entry)
    return found


def show(result: dict[str, Any]) -> str:
    """Tables of the result."""
    parts = []
    if (times := result.get("gpt2")) is not None:
        rows = [
            [name, *(cell(times[name][key]) for key in ("forward_us", "forward_backward_us"))] for name in ATTENTIONS
        ]
        parts.append(table(["GPT-2, 1 K tokens", "forward, us", "and backward, us"], rows))
    if (peaks := result.get("memory")) is not None:
        rows = [
            [str(entry["tokens"]), *(cell(None if entry[n] is None else entry[n] / 2**20) for n in ATTENTIONS)]
            for entry in peaks
        ]
        parts.append(table(["tokens", *(f"{name}, MiB" for name in ATTENTIONS)], rows))
    if (cases := result.get("sparse")) is not None:
        dense = cases[0]["us"]
        rows = [
            [c["pattern"], f"{c['kept']:.3f}", cell(c["us"]), cell(c["us"] and dense and c["us"] / dense, ".3f"),
             cell(c["layout_us"])]
            for c in cases
        ]  # fmt: skip
        parts.append(table(["pattern", "kept", "us", "of dense", "choosing blocks, us"], rows))
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    """Measure and print."""
    chosen = gpu_common.parser(__doc__).parse_args(arguments)
    report = Report(chosen.json)
    with gpu_common.meter(chosen.dry_run) as meter:
        size = FULL if meter.measures else TINY
        gate(size, meter)
        for name, part in (("gpt2", gpt2), ("memory", memory), ("sparse", sparse)):
            found = report.attempt(name, lambda part=part: part(size, meter))  # type: ignore[misc]
            if found is not None:
                report.put(**{name: found})
    print(show(report.result))
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
