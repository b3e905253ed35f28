"""Claim: a compressed checkpoint is on the GPU, ready to run, sooner than the plain one.

A model of Llama-3.1-8B's shape (fewer layers by default) with random weights is saved plain and compressed, in memory
(/dev/shm) if there is room, so that no disk is measured. Both are loaded through transformers, each in a process of its
own, files in the page cache; the time is from ``from_pretrained`` until the first logits, split in two. The logits are
compared bit for bit.

    python -m benchmarks.gpu_load [--layers 8] [--dry-run] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bitforbit
from benchmarks import gpu_common
from benchmarks.common import ROOT, table
from benchmarks.gpu_common import Meter, Report
from benchmarks.gpu_model import FULL, TINY, Size, build

LAYERS = 8
ROUNDS = 2
SHARED_MEMORY = Path("/dev/shm")
NAMES = ("bf16", "exact")


def make(size: Size, meter: Meter, folder: Path) -> dict[str, int]:
    """Write both checkpoints; their sizes in bytes."""
    model = build(size, meter.device).to("cpu")
    model.save_pretrained(folder / "bf16")
    del model
    bitforbit.compress(folder / "bf16", folder / "exact")
    return {name: sum(f.stat().st_size for f in (folder / name).iterdir() if f.is_file()) for name in NAMES}


def load(folder: Path, dry_run: bool) -> dict[str, Any]:
    """Load one checkpoint and run it once: seconds, peak memory, digest of the logits."""
    from transformers import AutoModelForCausalLM

    from bitforbit.integrations.autoload import autoload

    autoload()  # for a source tree; an installed package needs no call
    device = torch.device("cpu" if dry_run else "cuda")
    if not dry_run:
        torch.zeros(1, device=device)  # CUDA itself has started
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(device))
    _wait(device)
    loaded = time.perf_counter()
    if dry_run and folder.name == "exact":
        from bitforbit.nn import set_layout

        set_layout(model, "tiles")
    prompt = torch.arange(5, device=device)[None]
    with torch.inference_mode():
        logits = model(prompt).logits
    _wait(device)
    ran = time.perf_counter()
    return {
        "load_seconds": None if dry_run else loaded - begin,
        "first_run_seconds": None if dry_run else ran - loaded,
        "peak_bytes": None if dry_run else torch.cuda.max_memory_allocated(),
        "digest": hashlib.sha256(logits.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def measure(size: Size, meter: Meter) -> dict[str, Any]:
    """All of it. Raises AssertionError if the logits differ."""
    rounds = ROUNDS if meter.measures else 1
    needed = 40e9 * size.layers / FULL.layers
    inside = SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed else None
    with tempfile.TemporaryDirectory(dir=inside) as temporary:
        folder = Path(temporary)
        sizes = make(size, meter, folder)
        if meter.measures:
            torch.cuda.empty_cache()
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name in NAMES:
                runs[name].append(_in_process(folder / name) if meter.measures else load(folder / name, dry_run=True))
    digests = {run["digest"] for several in runs.values() for run in several}
    if len(digests) != 1:
        raise AssertionError("the compressed checkpoint gives other logits than the plain one")
    return {
        "layers": size.layers,
        "in_memory": inside is not None,
        "file_bytes": sizes,
        **{
            key: {name: _median([run[key] for run in runs[name]]) for name in NAMES}
            for key in ("load_seconds", "first_run_seconds", "peak_bytes")
        },
    }


def _in_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_load", "--load", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"loading {folder.name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = [
        ["files, GB", *(f"{result['file_bytes'][name] / 1e9:.2f}" for name in NAMES)],
        ["load, s", *(gpu_common.cell(result["load_seconds"][name], ".2f") for name in NAMES)],
        ["first run, s", *(gpu_common.cell(result["first_run_seconds"][name], ".2f") for name in NAMES)],
    ]
    peaks = [result["peak_bytes"][name] for name in NAMES]
    rows.append(["peak, GB", *(gpu_common.cell(None if peak is None else peak / 1e9, ".2f") for peak in peaks)])
    return table([f"{result['layers']} layers", "BF16", "compressed"], rows)


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = gpu_common.parser(__doc__)
    options.add_argument("--layers", type=int, default=LAYERS, help="of Llama-3.1-8B's 32")
    options.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.load is not None:
        print(json.dumps(load(chosen.load, dry_run=False)))
        return 0
    with gpu_common.meter(chosen.dry_run) as meter:
        result = measure(TINY if chosen.dry_run else replace(FULL, layers=chosen.layers), meter)
    Report(chosen.json).put(**result)
    print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
