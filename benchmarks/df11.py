"""Claim: the DF11 writer is more than a hundred times as fast as the official one, and DF11 files can be read on a CPU.

In memory, against `planes` in the same process. The official compressor is pure Python: 0.005 GB/s on a 2-core machine
(measured by this project with DFloat11 0.5.0, not part of this run); it has no decoder for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.codec import sources
from benchmarks.common import paired, save, table
from bitforbit import cpu
from bitforbit.codecs.df11.decode import decode_unit
from bitforbit.codecs.df11.encode import encode_unit
from bitforbit.codecs.df11.unit import Df11Unit
from bitforbit.codecs.planes import PlanesCodec

OFFICIAL_GB_PER_S = 0.005


def df11_bytes(unit: Df11Unit) -> int:
    """Bytes of the six tensors of a unit."""
    arrays = (
        unit.luts,
        unit.encoded_exponent,
        unit.sign_mantissa,
        unit.output_positions,
        unit.gaps,
        unit.split_positions,
    )
    return sum(a.nbytes for a in arrays)


def run(rounds: int = 3) -> dict[str, Any]:
    """Measure, print and save."""
    results, rows = [], []
    for name, matrices in sources():
        words = [np.ascontiguousarray(m).reshape(-1) for m in matrices]
        nbytes = sum(w.nbytes for w in words)
        whole = np.concatenate(words)
        codec = PlanesCodec()
        planes = [codec.encode_always(m.view(np.uint8).reshape(-1), "BF16", m.shape, "BF16", 1) for m in matrices]
        result: dict[str, Any] = {
            "source": name,
            "bf16_bytes": nbytes,
            "planes_bits_per_weight": round(16 * sum(p.nbytes for p in planes) / nbytes, 4),
        }
        unit = encode_unit(words)
        if not np.array_equal(decode_unit(unit), whole):
            raise AssertionError("DF11: decoded bytes differ")
        result["df11_bits_per_weight"] = round(16 * df11_bytes(unit) / nbytes, 4)
        functions: dict[str, Callable[[], object]] = {}
        for threads in sorted({1, cpu.default_threads()}):
            functions[f"write, {threads} threads"] = partial(encode_unit, words, threads=threads)
            functions[f"read, {threads} threads"] = partial(decode_unit, unit, threads=threads)
        for label, seconds in paired(functions, rounds).items():
            speed = nbytes / seconds / 1e9
            result[label] = round(speed, 3)
            versus = f"{speed / OFFICIAL_GB_PER_S:.0f}x" if label.startswith("write") else "-"
            rows.append([name, label, f"{speed:.2f}", versus])
        results.append(result)
        df11, ours = result["df11_bits_per_weight"], result["planes_bits_per_weight"]
        print(f"{name}: DF11 {df11:.3f}, planes {ours:.3f} bits/weight")
    print("\n" + table(["source", "", "GB/s", "vs official (0.005 GB/s)"], rows))
    summary = {"official_gb_per_s": OFFICIAL_GB_PER_S, "sources": results}
    save("df11", summary)
    return summary


if __name__ == "__main__":
    run()
