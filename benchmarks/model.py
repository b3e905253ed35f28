"""Claim: a compressed model generates faster than its BF16 self, with the same tokens, in two thirds of the memory.

A model of Llama-3.2-1B's shape with random weights (standard deviation 0.02) is made once, compressed, and kept in a
cache directory outside the repository (BITFORBIT_BENCH_CACHE, else ~/.cache/bitforbit/benchmarks). Then, greedily:
tokens and logits of mode exact are compared with those of BF16; speeds are medians with all variants taking turns in
one process; loading (files in the page cache) and memory are measured in processes of their own.

    python -m benchmarks.model            the full size, a few minutes
    python -m benchmarks.model --smoke    a tiny one, seconds; result in the cache directory
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitforbit
from benchmarks.common import save, table
from bitforbit.integrations.generation.compare import Comparison, Variant, compare
from bitforbit.integrations.generation.directory import ModelDirectory, open_directory
from bitforbit.integrations.generation.load import Mode
from bitforbit.integrations.generation.measure import Workload
from bitforbit.integrations.generation.worker import measure_in_process

MODES: tuple[Mode, ...] = ("exact", "fused")
STANDARD_DEVIATION = 0.02
ALLOWED_MEMORY_SHARE, ALLOWED_MEMORY_BYTES = 1.10, 200e6
"""While running: at most this share of the compressed weights plus this many bytes, beyond Python and torch."""


@dataclass(frozen=True)
class Size:
    """Shape of the model and of the measurement."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    workload: Workload
    rounds: int


FULL = Size("llama-1b", 16, 2048, 8192, 32, 8, 128256, Workload(prompt_tokens=32, new_tokens=64), 3)
SMOKE = Size("llama-tiny", 2, 256, 512, 4, 2, 2048, Workload(prompt_tokens=8, new_tokens=8), 1)


def cache() -> Path:
    """Where models are kept between runs."""
    chosen = os.environ.get("BITFORBIT_BENCH_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "bitforbit" / "benchmarks"


def build(size: Size) -> tuple[ModelDirectory, ModelDirectory]:
    """The plain and the compressed model, made if they are not there yet."""
    plain, compressed = cache() / size.name, cache() / f"{size.name}-bitforbit"
    if not plain.is_dir():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.initialization import no_init_weights

        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.hidden // size.heads,
            vocab_size=size.vocabulary,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
        with no_init_weights():
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.tie_weights()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=STANDARD_DEVIATION)
                else:
                    parameter.fill_(1.0)
        partial = plain.with_name(plain.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(plain)
    if not compressed.is_dir():
        bitforbit.compress(plain, compressed)
    return open_directory(plain), open_directory(compressed)


def figures(variant: Variant, loads: list[float]) -> dict[str, Any]:
    """One variant's part of the result file."""
    alone = variant.alone
    limit = ALLOWED_MEMORY_SHARE * alone.weight_bytes + ALLOWED_MEMORY_BYTES
    beyond = (alone.running_peak or alone.peak or 0) - (alone.baseline or 0)
    value = variant.to_json()
    del value["digest"], value["load_seconds"]
    return {
        **value,
        "load_seconds": statistics.median(loads),
        "running_peak_beyond_baseline": beyond,
        "running_peak_limit": round(limit),
        "within_limit": beyond <= limit,
    }


def measure(size: Size) -> tuple[Comparison, dict[str, Any]]:
    """The comparison and the result file's content. Raises AssertionError if exact is not exact."""
    plain, compressed = build(size)
    result = compare(compressed, MODES, size.workload, rounds=size.rounds, bf16=plain, say=lambda text: print(text))
    if not result.exact:
        raise AssertionError("mode exact gave other tokens or logits than BF16")
    loads: dict[Mode, list[float]] = {v.mode: [v.alone.load_seconds] for v in result.variants}
    short = Workload(prompt_tokens=1, new_tokens=2)
    for _ in range(2):
        for mode in ("bf16", "exact"):
            where = plain if mode == "bf16" else compressed
            loads[mode].append(measure_in_process(where.path, mode, short, result.threads).load_seconds)  # type: ignore[index, arg-type]
    return result, {
        "model": {key: value for key, value in vars(size).items() if key not in ("workload", "rounds")},
        "threads": result.threads,
        "paired": result.paired,
        "rounds": result.rounds,
        "workload": vars(size.workload),
        "plain_bytes": plain.num_bytes,
        "compressed_bytes": compressed.num_bytes,
        "variants": [figures(variant, loads[variant.mode]) for variant in result.variants],
    }


def run(size: Size = FULL) -> dict[str, Any]:
    """Measure, print and save."""
    result, values = measure(size)
    reference = values["variants"][0]
    rows = [
        [
            v["mode"],
            f"{v['tokens_per_second']:.2f}",
            f"{v['tokens_per_second'] / reference['tokens_per_second']:.2f}x",
            f"{v['first_token_seconds']:.2f} s",
            f"{v['load_seconds']:.2f} s",
            f"{v['weight_bytes'] / 1e6:.0f} MB",
            f"{v['running_peak_beyond_baseline'] / 1e6:.0f} MB",
            "yes" if v["within_limit"] else "NO",
            f"{100 * v['ran']['linears_share'].get('fused_exact', 0):.0f} %",
            f"{100 * v['ran']['weight_bytes_share'].get('fused_exact', 0):.0f} %",
        ]
        for v in values["variants"]
    ]
    headers = ["", "tokens/s", "vs BF16", "first token", "load", "weights", "memory running", "within limit"]
    turns = f"{result.rounds} rounds in turns" if result.paired else "one process after the other"
    print(f"\n{size.name}, {result.threads} threads, {size.workload.new_tokens} tokens, {turns}; exact: same bits\n")
    print(table([*headers, "linears fused-exact", "weights fused-exact"], rows))
    if size is SMOKE:
        (cache() / "smoke.json").write_text(json.dumps(values, indent=1) + "\n")
    else:
        save("model", values)
    return values


def main(arguments: list[str]) -> int:
    """Run at the size that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model; the result goes to the cache directory")
    run(SMOKE if parser.parse_args(arguments).smoke else FULL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
