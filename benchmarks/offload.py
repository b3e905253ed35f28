"""Claim: a model that does not fit in memory generates faster compressed than in BF16, within the same memory.

A Llama whose layers have the shape of Llama-3.2-3B's (random weights, standard deviation 0.02), of which a part is kept
in memory and the rest is read from disk for every token. For several budgets, each a share of the model's size in BF16,
the same prompt is continued greedily in each of these ways:

    accelerate BF16     transformers' and accelerate's own: device_map="auto", max_memory, "disk"
    streamed BF16       the plain model, its blocks read ahead by bitforbit: what reading ahead alone brings
    accelerate exact    the compressed model, its parts fetched by accelerate: what compression alone brings
    streamed exact      the compressed model, its blocks read ahead: what users get

Every way has the same bytes for its weights, and runs in a process of its own in a memory cgroup that may have those
bytes and what Python, torch and a tiny model need, page cache included; more is not given, so that what is read again
is read from disk. Files are taken out of the page cache before, and what stays in memory is copied out of the mapped
files after loading, or reading the rest would evict it. The gate: tokens and bits of logits are those of the
BF16 model in memory. Without the right to make cgroups there is no limit ("limited": false): then the page cache helps
whoever reads through it.

    python -m benchmarks.offload            minutes, and 6 GB in the cache directory (BITFORBIT_BENCH_CACHE)
    python -m benchmarks.offload --make     makes these 6 GB only, for another run to find
    python -m benchmarks.offload --smoke    a tiny model, seconds; result in the cache directory
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import memory_limit, model
from benchmarks.common import save, table
from benchmarks.offload_worker import Outcome, Task
from bitforbit.integrations.generation.directory import ModelDirectory
from bitforbit.integrations.generation.measure import Workload

IN_MEMORY = "in memory"
WAYS = ("accelerate BF16", "streamed BF16", "accelerate exact", "streamed exact")
READ_BYTES = 1 << 23
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Sizes:
    """The model, and shares of its size in BF16 to keep in memory."""

    model: model.Size
    shares: tuple[float, ...]
    disk_bytes: int
    """Read to measure the disk."""


LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 16, 3072, 8192, 32768
"""As Llama-3.2-3B but for fewer layers and tokens: the layers are then 94 % of the weights, as in larger models."""
FULL = Sizes(
    model.Size(
        "llama-3b-16", LAYERS, HIDDEN, INTERMEDIATE, 24, 8, VOCABULARY, Workload(prompt_tokens=16, new_tokens=5), 1
    ),
    (0.25, 0.5, 0.75),
    1 << 30,
)
SMOKE = Sizes(model.Size("llama-offload-tiny", 4, 256, 512, 4, 2, 2048, Workload(8, 4), 1), (0.6,), 1 << 22)


class OutOfMemoryError(Exception):
    """The limit did not suffice."""


def run_alone(task: Task) -> Outcome:
    """A task in a process of its own. Raises OutOfMemoryError, or RuntimeError with what went wrong."""
    root = Path(__file__).resolve().parents[1]
    search = [str(root), str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.offload_worker"],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "HF_HUB_OFFLINE": "1"},
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode == -9:
        raise OutOfMemoryError(f"{task.way}: ended by the kernel: its limit does not suffice")
    if done.returncode:
        raise RuntimeError(f"{task.way}: expected a result, got status {done.returncode}: {done.stderr[-2000:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def limited_run(
    way: str, directory: ModelDirectory, budget: int | None, overhead: int | None, workload: Workload
) -> Outcome:
    """In a cgroup, with files that are on disk only. Raises what run_alone raises."""
    memory_limit.forget([path for path in directory.path.iterdir() if path.suffix == ".safetensors"])
    limit = None if budget is None or overhead is None else budget + overhead
    with memory_limit.limited(limit) as group, tempfile.TemporaryDirectory(dir=model.cache()) as folder:
        path = None if group.path is None else str(group.path)
        return run_alone(
            Task(way, str(directory.path), budget, workload.prompt_tokens, workload.new_tokens, path, folder)
        )


def disk_bytes_per_second(path: Path, nbytes: int) -> float | None:
    """Of one large file, read in order past the page cache; None where the file system does not allow that."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    with os.fdopen(fd, "rb", buffering=0) as file, mmap.mmap(-1, READ_BYTES) as buffer:  # aligned to pages
        begin, count = time.perf_counter(), 0
        while count < nbytes and (got := file.readinto(buffer)):
            count += got
        return count / (time.perf_counter() - begin)


def measure(sizes: Sizes) -> dict[str, Any]:
    """All of it. Raises AssertionError if any way gives other bits than the model in memory."""
    plain, compressed = model.build(sizes.model)
    tiny = model.build(SMOKE.model)
    workload = sizes.model.workload
    bf16_bytes = sum(path.stat().st_size for path in plain.path.glob("*.safetensors"))
    # What a process needs whatever the model's size: the most that either kind of model takes when it is tiny.
    overhead = max(_peak(limited_run(IN_MEMORY, each, None, None, workload)) for each in tiny)
    reference = limited_run(IN_MEMORY, plain, None, None, workload)
    largest = max(plain.path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    result: dict[str, Any] = {
        "model": {key: value for key, value in vars(sizes.model).items() if key not in ("workload", "rounds")},
        "workload": vars(workload),
        "plain_bytes": bf16_bytes,
        "compressed_bytes": sum(path.stat().st_size for path in compressed.path.glob("*.safetensors")),
        "overhead_bytes": overhead,
        "limited": memory_limit.possible(),
        "disk_bytes_per_second": disk_bytes_per_second(largest, sizes.disk_bytes),
        "in_memory": figures(reference),
        "budgets": [],
    }
    for share in sizes.shares:
        budget = round(share * bf16_bytes)
        runs = {}
        for way in WAYS:
            directory = compressed if way.endswith("exact") else plain
            try:
                outcome = limited_run(way, directory, budget, overhead, workload)
            except OutOfMemoryError as error:
                runs[way] = {"error": str(error)}
                print(f"{share:.0%}: {error}", flush=True)
                continue
            if (outcome.tokens, outcome.digest) != (reference.tokens, reference.digest):
                raise AssertionError(f"{share:.0%}, {way}: expected the tokens and logits of the model in memory")
            runs[way] = figures(outcome)
            print(f"{share:.0%} {way}: {outcome.seconds_per_token:.2f} s/token, {outcome.blocks}", flush=True)
        predicted = {
            "accelerate BF16": predict(plain, "bf16", budget, workload, result["disk_bytes_per_second"]),
            "streamed exact": predict(compressed, "exact", budget, workload, result["disk_bytes_per_second"]),
        }
        result["budgets"].append({"share": share, "bytes": budget, "ways": runs, "predicted": predicted})
    return result


def predict(
    directory: ModelDirectory, method: str, budget: int, workload: Workload, disk: float | None
) -> dict[str, Any]:
    """What ``bitforbit plan`` says of this budget for weights, with the measured disk: the disk's time alone."""
    from bitforbit.planner import Elsewhere, KvSetting, Request, find_gpu, read_shape
    from bitforbit.planner.request import streaming_of

    context = workload.prompt_tokens + workload.new_tokens
    request = Request(read_shape(directory.path), find_gpu("CPU"), call=workload.prompt_tokens)
    streaming = streaming_of(request, method, KvSetting("16"), context)
    whole, load = streaming.whole, streaming.load
    beside = whole.scratch(load) + whole.activations(load) + whole.kv(load)
    plan = streaming.plan(budget + beside, Elsewhere(disk=disk))
    if plan is None:
        return {"resident": None, "bytes_per_token": None, "tokens_per_second": None}
    return {
        "resident": sum(plan.resident),
        "bytes_per_token": plan.disk_bytes,
        "tokens_per_second": plan.speed,
    }


def _peak(outcome: Outcome) -> int:
    return outcome.peak_rss or outcome.loaded_rss or 0


def figures(outcome: Outcome) -> dict[str, Any]:
    """One way's part of the result file."""
    values = asdict(outcome)
    del values["digest"]
    return {**values, "tokens_per_second": 1 / outcome.seconds_per_token}


def show(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = []
    for budget in result["budgets"]:
        for way, found in budget["ways"].items():
            if "error" in found:
                rows.append([f"{budget['share']:.0%}", way, *["out of memory"] * 5])
                continue
            beyond = (found["peak_rss"] or 0) - result["overhead_bytes"]
            rows.append(
                [
                    f"{budget['share']:.0%}",
                    way,
                    f"{found['tokens_per_second']:.3f}",
                    f"{found['first_token_seconds']:.1f} s",
                    f"{found['bytes_per_token'] / 1e9:.2f} GB",
                    f"{beyond / 1e9:.2f} GB",
                    ", ".join(f"{count} {place}" for place, count in found["blocks"].items()),
                ]
            )
    headers = ["memory", "", "tokens/s", "first token", "read per token", "peak beyond Python", "layers"]
    predictions = [
        f"{budget['share']:.0%} {way}: {found['tokens_per_second']:.3f} tokens/s predicted from the disk alone"
        for budget in result["budgets"]
        for way, found in budget["predicted"].items()
        if found["tokens_per_second"]
    ]
    return "\n".join([table(headers, rows), "", *predictions])


def run(sizes: Sizes = FULL) -> dict[str, Any]:
    """Measure, print and save."""
    result = measure(sizes)
    print(f"\n{result['plain_bytes'] / 1e9:.2f} GB in BF16; every way: same tokens, same bits of logits\n")
    print(show(result))
    if sizes is SMOKE:
        (model.cache() / "offload-smoke.json").write_text(json.dumps(result, indent=1) + "\n")
    else:
        save("offload", result)
    return result


def main(arguments: list[str]) -> int:
    """Run at the size that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model; the result goes to the cache directory")
    parser.add_argument("--make", action="store_true", help="make the models, and measure nothing")
    chosen = parser.parse_args(arguments)
    sizes = SMOKE if chosen.smoke else FULL
    if chosen.make:
        for size in (sizes.model, SMOKE.model):
            model.build(size)
    else:
        run(sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
