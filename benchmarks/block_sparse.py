"""Claim: block-sparse prefill takes time in proportion to the share of blocks that it keeps.

Causal, 8 query heads on 2 KV heads of 128 channels (a quarter of a layer of Llama-3.1-8B), blocks of 128 tokens,
against torch's SDPA, all in one process and taking turns. Choosing the layout counts as part of the time. "kept":
blocks computed, as a share of the causal ones; "of dense": time as a share of SDPA's; "words of dense": what the same
blocks move between slow and fast memory (FlashAttention-2's order, tiles of a block), as a share of dense's. The gate:
at every density, outputs are as close to FP64 as SDPA's with the layout as its mask, within a factor of two. The error
against dense attention is on Gaussian data, on which all blocks matter equally: no pattern can be good there.

    python -m benchmarks.block_sparse            some minutes
    python -m benchmarks.block_sparse --smoke    seconds, nothing is saved
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import paired, save, table
from bitforbit.attention import block_sparse, naive, patterns
from bitforbit.attention.grid import Grid
from bitforbit.attention.tiles import Tiles, layout_mask

HEADS, KV_HEADS, DIM = 8, 2, 128
BLOCK = 128
PATTERNS = ("local_global", "butterfly", "topk")
DENSITIES = (1.0, 0.5, 0.25, 0.125)
TOKENS = (4096, 16384)
GATE_TOKENS = 1000


def make(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v ``[1, heads, tokens, DIM]``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What everything is compared with."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sparse(q: Tensor, k: Tensor, v: Tensor, grid: Grid, pattern: str, density: float) -> Tensor:
    """Layout and attention."""
    layout = patterns.with_density(pattern, grid, density, q, k)
    return block_sparse.attention(q, k, v, layout, grid)


def gate(dtype: torch.dtype) -> None:
    """Raise AssertionError if an output is further from FP64 than twice SDPA's with the same tokens masked."""
    q, k, v = make(GATE_TOKENS, dtype)
    grid = Grid(GATE_TOKENS, GATE_TOKENS, BLOCK)
    causal = naive.visible(GATE_TOKENS, GATE_TOKENS, causal=True)
    for pattern in PATTERNS:
        for density in DENSITIES:
            layout = patterns.with_density(pattern, grid, density, q, k)
            heads = HEADS // layout.shape[1] if layout.shape[1] > 1 else 1
            mask = (
                layout_mask(layout.repeat_interleave(heads, 1), Tiles(BLOCK, BLOCK), GATE_TOKENS, GATE_TOKENS) & causal
            )
            exact, _ = naive.attention(q, k, v, mask=mask)
            plain = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            ours = (block_sparse.attention(q, k, v, layout, grid, backend="gather") - exact).abs().max()
            if ours > 2 * (plain - exact).abs().max():
                raise AssertionError(f"{pattern} at density {density}: outputs are off by {float(ours)}")


def measure(tokens: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One entry per pattern and density, the dense one first."""
    q, k, v = make(tokens, dtype)
    grid = Grid(tokens, tokens, BLOCK)
    functions: dict[str, Callable[[], object]] = {"dense": lambda: dense(q, k, v)}
    cases = [(pattern, density) for pattern in PATTERNS for density in DENSITIES if density < 1]
    for pattern, density in cases:
        functions[f"{pattern} {density}"] = lambda p=pattern, d=density: sparse(q, k, v, grid, p, d)  # type: ignore[misc]
    seconds = paired(functions, rounds)
    reference = dense(q, k, v).float()
    total = int(grid.visible().sum())
    entry = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    found = [entry | {"pattern": "dense", "density": 1.0, "blocks": total, "kept": 1.0, "seconds": seconds["dense"]}]
    for pattern, density in cases:
        layout = patterns.with_density(pattern, grid, density, q, k)
        error = (sparse(q, k, v, grid, pattern, density).float() - reference).norm() / reference.norm()
        found.append(
            entry
            | {
                "pattern": pattern,
                "density": density,
                "blocks": round(float(layout.sum()) / layout[..., 0, 0].numel()),
                "kept": grid.density(layout),
                "seconds": seconds[f"{pattern} {density}"],
                "error": float(error),
            }
        )
    for case in found:
        case["of_dense"] = case["seconds"] / seconds["dense"]
        case["words"] = words(tokens, case["blocks"])
    return found


def words(tokens: int, blocks: int) -> int:
    """Words moved for a head: Q, O and the log-sum-exp once, K and V once per block kept."""
    return 2 * tokens * DIM + tokens + blocks * 2 * BLOCK * DIM


def run(tokens: tuple[int, ...] = TOKENS, rounds: int = 3, keep: bool = True) -> dict[str, Any]:
    """Measure, print and save."""
    gate(torch.bfloat16)
    cases = [case for count in tokens for case in measure(count, torch.bfloat16, rounds)]
    result = {
        "heads": [HEADS, KV_HEADS, DIM],
        "block": BLOCK,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cases": cases,
    }
    blocks = {case["tokens"]: case["blocks"] for case in cases if case["pattern"] == "dense"}
    rows = [
        [
            str(case["tokens"]),
            case["pattern"],
            str(case["blocks"]),
            f"{case['kept']:.3f}",
            f"{1e3 * case['seconds']:.0f}",
            f"{case['of_dense']:.3f}",
            f"{case['words'] / words(case['tokens'], blocks[case['tokens']]):.3f}",
            f"{case['error']:.2f}" if "error" in case else "0",
        ]
        for case in cases
    ]
    print(table(["tokens", "pattern", "blocks a head", "kept", "ms", "of dense", "words of dense", "error"], rows))
    if keep:
        save("block_sparse", result)
    return result


if __name__ == "__main__":
    if "--smoke" in sys.argv[1:]:
        run((512,), rounds=1, keep=False)
    else:
        run()
