"""The I/O model against measured time on this CPU.

1. Tiled attention in both orders, one thread, d from 64 to 512: time, beside the words that the model says cross the
   border of the cache that holds the tiles. Tiles that the model picks for L1, for L2, and others; once with more
   tokens, so that keys and values exceed L2. Cache misses where the CPU's counters can be read (``perf``).
2. Bytes per generated token: products with one token (BF16 weights, plain and compressed) and scores against an exact
   BF16 cache; predicted time = bytes / bandwidth. What counts is the order: rank correlation with the measured times.

Every output is compared with FP64 before it is timed; variants take turns, medians count.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import gaussian_bf16, paired, save, table
from benchmarks.cpu_linear import Inputs, Matrix, compressed, make_inputs, own, plain
from bitforbit import cpu
from bitforbit.cpu import planes, tiled_attention
from bitforbit.cpu.caches import level_bytes
from bitforbit.cpu.linear import LANES
from bitforbit.cpu.tiled_attention import DEPTH, GROUP, WIDTH, Floats
from bitforbit.iomodel import Tiles, costs, this_cpu

CASES = ((2048, 64), (2048, 128), (2048, 256), (2048, 512), (4096, 512))
"""(N, d)."""
ROUNDS = 7
SHAPES = ((1024, 1024), (2048, 1024), (2048, 2048), (4096, 2048), (4096, 4096), (8192, 4096), (14336, 4096))
CHANNELS = 128
CACHES = (8192, 32768, 131072, 262144)
"""Tokens x heads of a cache."""
BYTES_AT_LEAST = 128 << 20
"""Size of all copies of what is read: more than the caches hold."""


def words(order: str, n: int, d: int, rows: int) -> int:
    """Words across the border of the cache that holds the tiles of native/generic/tiled_attention.hpp."""
    if order == "flash":
        return costs.flash2(n, d, 0, Tiles(rows, WIDTH, rows, d))
    return costs.improved(n, d, 0, Tiles(rows, WIDTH, rows, WIDTH)) + n * n  # exponentials are written back


def working_set(order: str, d: int, rows: int) -> int:
    """Words that should be in one cache together."""
    return rows * (2 * d + WIDTH if order == "flash" else WIDTH + DEPTH) + WIDTH * DEPTH


def held_by(order: str, d: int, rows: int) -> str:
    """The closest cache that holds the tiles."""
    nbytes = 4 * working_set(order, d, rows)
    return "L1" if nbytes <= level_bytes(1) else "L2" if nbytes <= level_bytes(2) else "-"


def configurations(n: int, d: int) -> list[tuple[str, int]]:
    """Orders and heights of tiles: the model's for L1 and for L2, and others."""
    picked = {(order, tiled_attention.tile_rows(order, d, n)) for order in tiled_attention.ORDERS}
    for_l2 = ("flash", tiled_attention.tile_rows("flash", d, n, level_bytes(2)))
    return sorted(picked | {for_l2, ("flash", GROUP), ("flash", 64), ("square", 64)})


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties; NaN if either is constant."""

    def ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
        x = np.asarray(values, float)
        return (x[:, None] > x).sum(axis=1) + ((x[:, None] == x).sum(axis=1) - 1) / 2

    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else float("nan")


def inputs(n: int, d: int) -> tuple[Floats, Floats, Floats]:
    q, k, v = np.random.default_rng(d).standard_normal((3, 1, n, d), np.float32)
    return q, k, v


def check(q: Floats, k: Floats, v: Floats, order: str, rows: int) -> None:
    """The gate: close to FP64."""
    q, k, v = (x[:, :200] for x in (q, k, v))
    s = q[0].astype(float) @ k[0].astype(float).T / np.sqrt(q.shape[2])
    p = np.exp(s - s.max(axis=1, keepdims=True))
    expected = p / p.sum(axis=1, keepdims=True) @ v[0].astype(float)
    error = np.abs(tiled_attention.attention(q, k, v, order, rows=rows)[0] - expected).max()
    if not error < 1e-5:
        raise AssertionError(f"{order}, {rows} rows, d = {q.shape[2]}: off by {error}")


def misses(order: str, n: int, d: int, rows: int) -> float | None:
    """L1 misses of one run by the CPU's counters, of five runs less those of none; None where they cannot be read."""
    counts = [_misses(order, n, d, rows, runs) for runs in (0, 5)]
    return None if None in counts else (counts[1] - counts[0]) / 5  # type: ignore[operator]


def _misses(order: str, n: int, d: int, rows: int, runs: int) -> float | None:
    if shutil.which("perf") is None:
        return None
    script = (
        "from benchmarks import io_attention as b; from bitforbit.cpu.tiled_attention import attention as f\n"
        f"x = b.inputs({n}, {d})\nfor _ in range({runs}): f(*x, '{order}', rows={rows})"
    )
    command = ["perf", "stat", "-x", ",", "-e", "L1-dcache-load-misses", sys.executable, "-c", script]
    return parse_perf(subprocess.run(command, capture_output=True, text=True, check=False).stderr)


def parse_perf(text: str) -> float | None:
    """The count in the output of ``perf stat -x ,``; None for "<not supported>" and errors."""
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[2].startswith("L1-dcache-load-misses") and fields[0].isdigit():
            return float(fields[0])
    return None


def measure_attention(isa: str, cases: Sequence[tuple[int, int]] = CASES, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Seconds, GFLOP/s and the model's words of every configuration on one instruction set, one thread."""
    results = []
    with cpu.force(isa):
        for n, d in cases:
            q, k, v = inputs(n, d)
            functions: dict[str, Callable[[], object]] = {}
            for order, rows in configurations(n, d):
                check(q, k, v, order, rows)
                functions[f"{order} {rows}"] = lambda o=order, r=rows, x=(q, k, v): tiled_attention.attention(
                    *x, o, rows=r
                )
            seconds = paired(functions, rounds)
            for order, rows in configurations(n, d):
                time = seconds[f"{order} {rows}"]
                results.append(
                    {
                        "isa": isa, "n": n, "d": d, "order": order, "rows": rows,
                        "held_by": held_by(order, d, rows),
                        "picked": rows == tiled_attention.tile_rows(order, d, n),
                        "words": words(order, n, d, rows), "seconds": time,
                        "gflops": round(4 * n * n * d / time / 1e9, 1), "l1_misses": misses(order, n, d, rows),
                    }
                )  # fmt: skip
            print(
                f"{isa}, N = {n}, d = {d}: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()),
                flush=True,
            )
    return results


def make_matrix(rows: int, cols: int) -> Matrix:
    """Copies of a BF16 matrix, plain and compressed."""
    data = np.resize(gaussian_bf16(min(rows, 1024), cols), (rows, cols)).reshape(-1).view(np.uint8)
    copies = max(1, -(-BYTES_AT_LEAST // data.size))
    per_table, parts = planes.encode(data, "BF16", False, rows, cols, 0, cpu.default_threads())
    all_parts = [{k: own(v) for k, v in parts.items()} for _ in range(copies)]
    return Matrix(rows, cols, per_table, [own(data) for _ in range(copies)], all_parts)


def measure_bytes(shapes: Sequence[tuple[int, int]] = SHAPES, caches: Sequence[int] = CACHES) -> list[dict[str, Any]]:
    """Bytes and seconds of everything that a step of generation reads, one thread."""
    results = []
    for rows, cols in shapes:
        matrix = make_matrix(rows, cols)
        x: Inputs = make_inputs(matrix, 1)
        copies = len(matrix.plain)
        functions = {"BF16": plain(LANES)(matrix, x, 1), "compressed": compressed(LANES)(matrix, x, 1)}
        for name, seconds in paired(functions, ROUNDS).items():
            nbytes = 2 * rows * cols if name == "BF16" else sum(part.size for part in matrix.parts[0].values())
            results.append({"what": f"{name} {rows} x {cols}", "bytes": nbytes, "seconds": seconds / copies})
    for tokens in caches:
        keys = own(gaussian_bf16(tokens, CHANNELS).reshape(-1).view(np.uint8))
        copies = -(-BYTES_AT_LEAST // keys.size)
        matrix = Matrix(tokens, CHANNELS, tokens, [own(keys) for _ in range(copies)], [])
        seconds = paired({"scores": plain(LANES)(matrix, make_inputs(matrix, 1), 1)}, ROUNDS)["scores"]
        results.append({"what": f"scores of {tokens} keys", "bytes": keys.size, "seconds": seconds / copies})
    return results


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory: 256 MB of integers, reduced (BLAS may use more)."""
    x = np.ones(32 << 20, np.uint64)
    return x.nbytes / paired({"reduce": lambda: np.bitwise_or.reduce(x)}, ROUNDS)["reduce"]


def run() -> dict[str, Any]:
    """Measure, print and save."""
    best = cpu.active()
    isas = [best] + [isa for isa in ("avx2",) if cpu.implementations().get(isa) and isa != best]
    attention = [result for isa in isas for result in measure_attention(isa)]
    rows = [
        [
            r["isa"], r["n"], r["d"], r["order"], f"{r['rows']}{' *' if r['picked'] else ''}", r["held_by"],
            f"{r['words'] / 1e6:.0f}", f"{1e3 * r['seconds']:.1f}", r["gflops"],
            "-" if r["l1_misses"] is None else f"{r['l1_misses'] / 1e6:.1f}",
        ]
        for r in attention
    ]  # fmt: skip
    print("\nTiled attention, one head, one thread (*: the model's tile for L1)\n")
    headings = ["ISA", "N", "d", "order", "rows", "held by", "10^6 words", "ms", "GFLOP/s", "10^6 L1 misses"]
    print(table(headings, [[str(cell) for cell in row] for row in rows]))
    correlations = {}
    for isa in isas:
        of_isa = [r for r in attention if r["isa"] == isa and r["held_by"] != "-"]
        correlations[isa] = _correlation(of_isa)
        for n, d in CASES:
            correlations[f"{isa} N={n} d={d}"] = _correlation([r for r in of_isa if (r["n"], r["d"]) == (n, d)])
    print("\nrank correlation of words with time: " + ", ".join(f"{k} {v:.2f}" for k, v in correlations.items()))

    traffic, speed = measure_bytes(), bandwidth()
    machine = this_cpu().with_bandwidths({"DRAM": speed})
    for r in traffic:
        r["predicted_seconds"] = r["bytes"] / (machine.level("DRAM").bandwidth or speed)
    correlation = rank_correlation([r["predicted_seconds"] for r in traffic], [r["seconds"] for r in traffic])
    print(f"\nBytes per token: predicted = bytes / {speed / 1e9:.1f} GB/s (a reduction's), one thread\n")
    cells = [
        [r["what"], f"{r['bytes'] / 1e6:.1f}", f"{1e3 * r['predicted_seconds']:.3f}", f"{1e3 * r['seconds']:.3f}"]
        for r in traffic
    ]
    print(table(["what is read", "MB", "predicted ms", "measured ms"], cells))
    off = statistics.median(r["seconds"] / r["predicted_seconds"] for r in traffic)
    print(f"\nrank correlation {correlation:.3f}; measured / predicted: median {off:.2f}")
    summary = {
        "attention": attention, "words_and_time": correlations,
        "bytes": traffic, "bandwidth": speed, "bytes_and_time": correlation,
    }  # fmt: skip
    save("io_attention", summary)
    return summary


def _correlation(results: Sequence[dict[str, Any]]) -> float:
    """Of words and seconds."""
    return rank_correlation([r["words"] for r in results], [r["seconds"] for r in results])


if __name__ == "__main__":
    run()
