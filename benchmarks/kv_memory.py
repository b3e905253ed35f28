"""Claim: at 32 K tokens caches of 4 bits, K4V2, 2 bits are 3.1, 3.9, 5.1 times smaller than BF16, everything included.

Each case is a process of its own, without a model: layers in the shape of Llama-3.1-8B's (8 key-value heads of 128
channels, 32 query heads) get random keys and values, layer by layer, as a model hands them over. Prefill: all tokens
but the last 64 in one call, of which the last row is a query (what a model needs beside it is the same for all).
Growth: two calls of 24 tokens. Decode: 16 single tokens; QuantizedCache has half its window full then. Bytes are
counted from the tensors; peaks are the process's high-water mark (VmHWM) in each phase above its resident size before.
Large tensors are given back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the mark is what was in use, not
what the allocator kept.

    python -m benchmarks.kv_memory            minutes
    python -m benchmarks.kv_memory --smoke    seconds; no result file
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.common import ROOT, save

CASES = ("16", "8", "4", "k4v2", "2", "quanto 4", "quanto 2")
HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
GROWTH, DECODE = (24, 24), 16
TOKENS = (1024, 4096, 8192, 16384, 32768)
LAYERS = 8


def measure(case: str, tokens: int, layers: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from transformers import LlamaConfig

    from bitforbit.integrations.generation import memory

    config = LlamaConfig(
        hidden_size=QUERY_HEADS * HEAD_DIM, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS,
        head_dim=HEAD_DIM, num_hidden_layers=layers, attn_implementation="sdpa",
    )  # fmt: skip
    driver = Driver(config, case)
    with torch.inference_mode():
        driver.drive(512, lambda phase: None)  # imports, pools of threads, scratch memory
        peaks: dict[str, int] = {}
        before = memory.resident_bytes() or 0
        resettable = memory.reset_peak()

        def phase_done(phase: str) -> None:
            peaks[phase] = max(0, (memory.peak_bytes() or 0) - before)
            memory.reset_peak()

        cache = driver.drive(tokens, phase_done)
        resident = (memory.resident_bytes() or 0) - before
    return {
        "case": case, "tokens": tokens, "layers": layers, "cache_bytes": driver.num_bytes(cache), "resident": resident,
        "peaks": peaks, "peak": max(peaks.values()), "phases_apart": resettable,
        "bits": driver.bits(cache), "name": driver.variant.name, "settings": driver.variant.settings,
    }  # fmt: skip


class Driver:
    """Hands keys and values to a cache as a model of ``config`` would, and attends."""

    def __init__(self, config: Any, case: str) -> None:
        import torch
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from benchmarks import kv_caches
        from bitforbit.integrations.transformers.kv.attention import kivi_attention

        self.config = config
        self.variant = _variant(case)
        self.attention = kivi_attention if self.variant.family == "bitforbit" else sdpa_attention_forward
        self.caches = kv_caches
        self.block = torch.randn(1, HEADS, 1024, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()

        class Module(torch.nn.Module):
            num_key_value_groups, is_causal, layer_idx = QUERY_HEADS // HEADS, True, 0

        self.module = Module()

    def drive(self, tokens: int, done: Any) -> Any:
        """Prefill, growth, decode; ``done`` hears of each phase. Returns the cache."""
        cache = self.variant.make(_Model(self.config))
        self._call(cache, tokens - sum(GROWTH) - DECODE, 1)
        done("prefill")
        for chunk in GROWTH:
            self._call(cache, chunk, chunk)
        done("growth")
        for _ in range(DECODE):
            self._call(cache, 1, 1)
        done("decode")
        return cache

    def _call(self, cache: Any, tokens: int, queries: int) -> None:
        import torch

        seen = cache.get_seq_length() + tokens
        mask = None
        if queries > 1:
            mask = torch.ones(1, 1, queries, seen, dtype=torch.bool).tril(seen - queries)
        for layer in range(self.config.num_hidden_layers):
            keys, values = (self._tensor(HEADS, tokens) for _ in range(2))
            query = self._tensor(QUERY_HEADS, queries)
            got = cache.update(keys, values, layer)
            self.attention(self.module, query, *got, mask, scaling=HEAD_DIM**-0.5, is_causal=False)
            del keys, values, got

    def _tensor(self, heads: int, tokens: int) -> Any:
        """Fresh memory, [1, heads, tokens, D]."""
        import torch

        out = torch.empty(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16)
        for begin in range(0, tokens, 1024):
            count = min(1024, tokens - begin)
            for head in range(0, heads, HEADS):
                out[:, head : head + HEADS, begin : begin + count] = self.block[:, :, :count]
        return out

    def num_bytes(self, cache: Any) -> int:
        """Bytes of all tensors of a cache."""
        return int(self.caches.num_bytes(list(cache.layers)))

    def bits(self, cache: Any) -> float:
        """Bits of a quantized element."""
        return float(self.caches.quantized_bits(self.variant, cache))


class _Model:
    """What the makers of caches ask of a model."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _variant(case: str) -> Any:
    from benchmarks import kv_caches

    backend, _, bits = case.rpartition(" ")
    if backend:
        return kv_caches.quantized(backend, int(bits), best=True)
    if case == "16":
        return kv_caches.exact()
    k_bits, v_bits = (4, 2) if case == "k4v2" else (int(case), int(case))
    return kv_caches.kivi(k_bits, v_bits, sink=4)


def in_process(case: str, tokens: int, layers: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own. Raises RuntimeError with what it wrote if it fails."""
    search = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kv_memory", "--one", case, str(tokens), str(layers)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": search, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case}, {tokens} tokens: expected figures, got status {done.returncode}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(tokens: Sequence[int] = TOKENS, layers: int = LAYERS, smoke: bool = False) -> dict[str, Any]:
    """Measure, print and save."""
    from benchmarks import kv_caches

    cases = [case for case in CASES if not case.startswith("quanto") or kv_caches.installed("quanto")]
    points = []
    for count in tokens:
        plain: dict[str, Any] = {}
        for case in cases:
            point = in_process(case, count, layers)
            plain = plain or point
            point["smaller"] = plain["cache_bytes"] / point["cache_bytes"]
            point["peak_smaller"] = plain["peak"] / point["peak"]
            points.append(point)
            mib = {name: f"{value / 2**20:.1f}" for name, value in point["peaks"].items()}
            print(f"{count:6} {point['name']:24} {point['cache_bytes'] / 2**20:8.1f} MiB {point['smaller']:5.2f}x  "
                  f"resident {point['resident'] / 2**20:8.1f}  peak {point['peak'] / 2**20:8.1f} "
                  f"{point['peak_smaller']:5.2f}x {mib}", flush=True)  # fmt: skip
    values = {
        "layers": layers, "heads": HEADS, "head_dim": HEAD_DIM, "query_heads": QUERY_HEADS, "growth": list(GROWTH),
        "decode": DECODE, "points": points,
    }  # fmt: skip
    if not smoke:
        save("kv_memory", values)
    return values


def main(arguments: list[str]) -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--smoke", action="store_true", help="two layers, 1024 tokens; nothing is saved")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "TOKENS", "LAYERS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        case, tokens, layers = chosen.one
        print(json.dumps(measure(case, int(tokens), int(layers))))
    elif chosen.smoke:
        run((1024,), 2, smoke=True)
    else:
        run(chosen.tokens, chosen.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
