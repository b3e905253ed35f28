"""Everything that a machine with a GPU can check and measure, in one go: ``make gpu``.

Builds the package into ``build/gpu``, runs the tests that need a GPU, every benchmark of it, and compute-sanitizer. It
needs no network and installs nothing outside of ``build``. Each step has a limit and all of them share a budget; one
that fails is reported and does not stop the next. The result, ``gpu-<device>-<date>.json``, is written anew after every
step, to ``benchmarks/results`` and, with the log, to ``$OUT`` if that is set.

    python3 -m benchmarks.gpu              exits with 1 if a step failed, with 2 if there is no GPU
    python3 -m benchmarks.gpu --dry-run    the same steps, as far as a CPU can go: kernels emulated, sizes tiny
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
BUDGET_SECONDS = 470
KILL_SECONDS = 5
NO_GPU = 2

MODELS = "tests/gpu/test_models_gpu.py"
BENCHMARKS = ("decode", "linear", "model", "load", "kv", "attention", "offload")
LIMITS = {"offload": 90}
"""Seconds of benchmarks that have others than usual."""
ASKED_FOR = ("tune",)
"""Benchmarks for those who change kernels: part of a dry run, and of a run with ``--only``."""
TESTS = {
    "kernels": ("tests/gpu/test_launcher_gpu.py", "tests/cuda"),
    "operators": ("tests/ops", "tests/gpu", "--ignore=tests/gpu/test_launcher_gpu.py", f"--ignore={MODELS}"),
    "models": ("tests/nn", MODELS),
}
"""Arguments of pytest, by what is tested: with what a kernel does wrong, the others need not be looked at."""
FUSED = "tests/cuda/test_fused_linear.py"
SANITIZED = {
    "fused": (FUSED, "-k", "variants or tokens or columns or groups or escapes"),
    "others": ("tests/cuda", f"--ignore={FUSED}"),
}
"""Made for the emulation, so shapes are small and odd. Fused products first: most is on its way at once there."""
SANITIZER_OPTIONS = ("--error-exitcode", "9", "--launch-timeout", "60", "--report-api-errors", "no")
"""Imports take longer than compute-sanitizer waits by itself for a process that uses CUDA. We check what the driver
returns ourselves, and cuda.bindings asks for functions that a driver may lack, which would count as errors."""


@dataclass(frozen=True)
class Step:
    """A command with a limit."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    environment: tuple[tuple[str, str], ...] = ()
    result: Path | None = None
    """JSON that the command writes."""


def steps(dry_run: bool, work: Path, only: Sequence[str] = ()) -> list[Step]:
    """What to run, the most needed first; ``only`` these steps, build and facts, if any are named."""
    python = sys.executable
    small = ("--dry-run",) if dry_run else ()
    facts = work / "facts.json"
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
    pytest += ("--continue-on-collection-errors", "--maxfail=25")
    # A kernel that never ends cannot be interrupted from Python: the stack at least says which test waits for it.
    pytest += ("-o", "faulthandler_timeout=40")
    build, tests, benchmarks = [], {}, {}
    if not dry_run:
        site = str(BUILD / "site")
        pip = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target", site)
        build.append(Step("build", (python, *pip, "."), 180))
    build.append(Step("facts", (python, "-m", "benchmarks.gpu_common", "--json", str(facts), *small), 60, result=facts))
    for name, arguments in TESTS.items():
        there = [argument for argument in arguments if argument.startswith("-") or (ROOT / argument).exists()]
        tests[name] = Step(f"tests {name}", (*pytest, "--timeout=100", *there), 150)
    for name in (*BENCHMARKS, *ASKED_FOR):
        file = work / f"{name}.json"
        command = (python, "-m", f"benchmarks.gpu_{name}", "--json", str(file), *small)
        limit = BUDGET_SECONDS if name in ASKED_FOR else LIMITS.get(name, 130)
        benchmarks[name] = Step(f"benchmark {name}", command, limit, result=file)
    if dry_run:
        tests = {"all": Step("tests", (*pytest, "--collect-only", "tests/gpu"), 100)}
        found = [*build, *tests.values(), *benchmarks.values()]
    else:
        sanitizers = {step.name: step for step in sanitizer_steps(pytest)}
        found = [
            *build,
            tests["kernels"],
            benchmarks["linear"],
            tests["operators"],
            benchmarks["model"],
            benchmarks["decode"],
            benchmarks["kv"],
            tests["models"],
            *(step for name, step in sanitizers.items() if "fused" in name),
            benchmarks["load"],
            benchmarks["attention"],
            benchmarks["offload"],
            *(step for name, step in sanitizers.items() if "fused" not in name),
            *(benchmarks[name] for name in ASKED_FOR if f"benchmark {name}" in only),
        ]
    return [step for step in found if not only or step.name in (*only, "build", "facts")]


def sanitizer_steps(pytest: tuple[str, ...]) -> list[Step]:
    """compute-sanitizer over the tests of kernels, if it is installed."""
    sanitizer = find_sanitizer()
    found = []
    for what, arguments in SANITIZED.items() if sanitizer else ():
        for tool in ("memcheck", "racecheck"):
            command = (str(sanitizer), "--tool", tool, *SANITIZER_OPTIONS, *pytest, "--timeout=0", *arguments)
            environment = (("BITFORBIT_TEST_EXACT_ALLOCATIONS", "1"),)
            found.append(Step(f"{tool} {what}", command, 120 if what == "others" else 60, environment))
    return found


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, if it is installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def environment(dry_run: bool) -> dict[str, str]:
    """The commands' environment: the package from ``build/gpu`` (as installed in a dry run), and no network."""
    values = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    if not dry_run:
        values["PYTHONPATH"] = os.pathsep.join([str(BUILD / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    values.setdefault("BITFORBIT_CACHE", str(BUILD / "cache"))
    values.setdefault("BITFORBIT_TEST_CACHE", str(BUILD / "test-cache"))  # or each step would compile all kernels
    return {**values, "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def run(step: Step, seconds: float, log: TextIO, values: dict[str, str]) -> dict[str, Any]:
    """Run one step for at most this long, its output on the terminal and in the log."""
    begin = time.monotonic()
    _say(f"\n=== {step.name} (at most {seconds:.0f} s): {' '.join(step.command)}\n", log)
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**values, **dict(step.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it started ends with it
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    last = ""

    def pass_on() -> bool:
        nonlocal last
        text = (process.stdout.read() or b"").decode(errors="replace") if process.stdout else ""
        _say(text, log)
        last = (last + text)[-2000:]
        return bool(text)

    while True:
        running = process.poll() is None  # asked before reading: what was written before the end is not missed
        busy = pass_on()
        if not running:
            status = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
            break
        if time.monotonic() - begin > seconds:
            _stop(process)
            pass_on()
            status = "out of time"
            break
        if not busy:
            time.sleep(0.05)
    lines = [line for line in last.strip().splitlines() if line.strip()]
    return {
        "name": step.name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "last_line": lines[-1] if lines else "",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # pytest reports what it has at the first one
        try:
            os.killpg(process.pid, sent)
            process.wait(KILL_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def _say(text: str, log: TextIO) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    log.write(text)
    log.flush()


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def file_name(result: dict[str, Any]) -> str:
    """``gpu-<device>-<date>.json``."""
    unknown = "emulated" if result["dry_run"] else "unknown"
    name = result.get("device", {}).get("name", unknown).lower().replace("nvidia", "")
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"gpu-{slug}-{result['date']}.json"


def write(result: dict[str, Any], folders: Sequence[Path]) -> None:
    """Write the result to every folder."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file_name(result)).write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Run the steps."""
    options = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--dry-run", action="store_true", help="on the CPU: kernels emulated, tiny, without figures")
    options.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything")
    options.add_argument("--only", action="append", metavar="STEP", help="run these steps only, and build and facts")
    options.add_argument("--results", type=Path, help="where the result goes instead of benchmarks/results")
    options.add_argument("--commit", help="the commit, where git cannot tell")
    chosen = options.parse_args(arguments)
    if not chosen.dry_run and not has_gpu():
        print(
            "expected an NVIDIA GPU that torch can use, found none: `make gpu` needs one. "
            "`make gpu GPU_ARGS=--dry-run` goes through the same steps with the kernels emulated on the CPU.",
            file=sys.stderr,
        )
        return NO_GPU
    begin = time.monotonic()
    work = chosen.results or BUILD / "results"
    work.mkdir(parents=True, exist_ok=True)
    folders = [chosen.results or (work if chosen.dry_run else ROOT / "benchmarks" / "results")]
    out = os.environ.get("OUT")
    folders += [Path(out)] if out else []
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dry_run": chosen.dry_run,
        "steps": [],
    }
    values = environment(chosen.dry_run)
    log_file = (Path(out) if out else work) / "gpu.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as log:
        for step in steps(chosen.dry_run, work, chosen.only or ()):
            left = chosen.budget - (time.monotonic() - begin)
            if left < 1:
                result["steps"].append({"name": step.name, "status": "no time left", "seconds": 0, "last_line": ""})
                continue
            if step.result is not None:
                step.result.unlink(missing_ok=True)
            result["steps"].append(run(step, min(step.limit_seconds, left), log, values))
            if step.result is not None and step.result.exists():
                content = json.loads(step.result.read_text())
                result.update(content if step.name == "facts" else {step.name.removeprefix("benchmark "): content})
                if chosen.commit and "machine" in result:
                    result["machine"]["commit"] = chosen.commit
            if step.name != "build":  # the name of the file comes with the facts
                write(result, folders)
        _say("\n" + summary(result) + "\n", log)
    return 0 if all(step["status"] == "passed" for step in result["steps"]) else 1


def summary(result: dict[str, Any]) -> str:
    """One line per step."""
    return "\n".join(
        f"{s['name']:<20} {s['status']:<14} {s['seconds']:>6} s  {s['last_line']}" for s in result["steps"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
