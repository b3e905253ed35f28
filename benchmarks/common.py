"""What every benchmark shares: machine, versions, commit, paired medians, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = (":!README.md", ":!benchmarks/results")
"""Files that the benchmarks write themselves: their changes do not count as changes of the commit."""

Bytes = npt.NDArray[np.uint8]


def paired(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; the functions take turns, so that a drift of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        function()  # warm-up
        del name
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """CPU, versions and commit, to go with every figure."""
    from bitforbit import cpu

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    packages = ("bitforbit", "numpy", "zipnn", "zstandard", "torch", "transformers", "optimum-quanto", "hqq")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cpus": cpu.default_threads(),
        "instruction_sets": [name for name, supported in cpu.implementations().items() if supported],
        "python": platform.python_version(),
        "versions": versions,
        "commit": (_git("rev-parse", "--short=12", "HEAD") or "unknown")
        + (
            "+changes"
            if _git("status", "--porcelain", "-uno", "--", ".", ":!README.md", ":!benchmarks/results")
            else ""
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``, machine included."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **results}, indent=1) + "\n")
    return path


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [headers, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def gaussian_bf16(rows: int, cols: int, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Gaussian weights of standard deviation 0.02, rounded to BF16 (to nearest, ties to even)."""
    rng = np.random.default_rng(seed)
    out = np.empty((rows, cols), np.uint16)
    for begin in range(0, rows, 1024):
        out[begin : begin + 1024] = to_bf16(rng.standard_normal((min(1024, rows - begin), cols), np.float32) * 0.02)
    return out


def to_bf16(floats: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bit patterns of finite float32 numbers rounded to BF16."""
    words = np.ascontiguousarray(floats, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
