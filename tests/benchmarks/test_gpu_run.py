"""``make gpu``: steps, limits, results, and a dry run through all of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import Step

from benchmarks import gpu


def run(code: str, seconds: float = 20, *arguments: str) -> tuple[dict[str, Any], str]:
    """A step that runs Python code; its entry and the log."""
    log = io.StringIO()
    step = Step("probe", (sys.executable, "-c", code, *arguments), seconds, (("PROBE", "here"),))
    return gpu.run(step, seconds, log, dict(os.environ)), log.getvalue()


def test_a_step_that_passes() -> None:
    entry, log = run("import os; print('first'); print(os.environ['PROBE'])")
    assert entry["status"] == "passed"
    assert entry["last_line"] == "here"
    assert "=== probe" in log
    assert "first\nhere\n" in log


def test_a_step_that_fails() -> None:
    entry, log = run("raise SystemExit('went wrong')")
    assert entry["status"] == "failed (1)"
    assert "went wrong" in log


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import time, pathlib, sys; time.sleep(3); pathlib.Path(sys.argv[1]).touch()"
    code = (
        "import subprocess, sys, time\nprint('started', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
        "try: time.sleep(60)\nfinally: print('what I have')"
    )
    entry, log = run(code, 1.5, str(tmp_path / "late"))
    assert entry["status"] == "out of time"
    assert entry["seconds"] < 1.5 + 3 * gpu.KILL_SECONDS
    assert "started" in log
    assert "what I have" in log  # it is asked to end first
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_step_that_never_stops_talking_has_a_limit_too() -> None:
    entry, log = run("while True: print('still here', flush=True)", 1)
    assert entry["status"] == "out of time"
    assert "still here" in log


def test_long_output_is_complete() -> None:
    entry, log = run("print('x' * 3_000_000 + 'end')")
    assert entry["status"] == "passed"
    assert log.rstrip().endswith("xend")
    assert log.count("x") >= 3_000_000


def test_the_steps_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    steps = {step.name: step for step in gpu.steps(False, tmp_path)}
    assert list(steps)[:3] == ["build", "facts", "tests kernels"]
    assert list(steps)[-2:] == ["memcheck others", "racecheck others"]
    assert list(steps).index("racecheck fused") < list(steps).index("benchmark load")
    assert gpu.FUSED in steps["racecheck fused"].command
    assert (gpu.ROOT / gpu.FUSED).is_file()
    assert {f"benchmark {name}" for name in gpu.BENCHMARKS} | {f"tests {name}" for name in gpu.TESTS} <= set(steps)
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(steps["build"].command)
    assert steps["racecheck others"].command[0] == "/opt/compute-sanitizer"
    assert steps["racecheck others"].command[3 : 3 + len(gpu.SANITIZER_OPTIONS)] == gpu.SANITIZER_OPTIONS
    assert all("--dry-run" not in step.command for step in steps.values())
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert not [step.name for step in gpu.steps(False, tmp_path) if "check" in step.name]


def test_steps_that_are_asked_for(tmp_path: Path) -> None:
    steps = [step.name for step in gpu.steps(False, tmp_path, ["benchmark tune", "tests models"])]
    assert steps == ["build", "facts", "tests models", "benchmark tune"]
    assert "benchmark tune" not in [step.name for step in gpu.steps(False, tmp_path)]


def test_nothing_of_pips_settings_reaches_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "constraints.txt")
    values = gpu.environment(False)
    assert "PIP_CONSTRAINT" not in values
    assert values["PYTHONPATH"].split(os.pathsep)[0].endswith("build/gpu/site")


def test_tests_share_the_kernels_that_they_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITFORBIT_TEST_CACHE", raising=False)
    assert gpu.environment(False)["BITFORBIT_TEST_CACHE"] != gpu.environment(False)["BITFORBIT_CACHE"]
    monkeypatch.setenv("BITFORBIT_TEST_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_the_cache_in_force"]
    done = subprocess.run(command, env={**os.environ, "EXPECTED_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_cache_in_force() -> None:
    """Run by the test before, too."""
    expected = os.environ.get("EXPECTED_CACHE")
    assert expected is None or os.environ["BITFORBIT_CACHE"] == expected


def test_file_names() -> None:
    assert (
        gpu.file_name({"device": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2026-01-02", "dry_run": False})
        == "gpu-h100-80gb-hbm3-2026-01-02.json"
    )
    assert gpu.file_name({"date": "2026-01-02", "dry_run": True}) == "gpu-emulated-2026-01-02.json"
    assert gpu.file_name({"date": "2026-01-02", "dry_run": False}) == "gpu-unknown-2026-01-02.json"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main([]) == 2
    assert "GPU_ARGS=--dry-run" in capsys.readouterr().err


def test_a_step_without_time_left_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--budget", "0", "--results", str(tmp_path)]) == 1
    assert "no time left" in capsys.readouterr().out


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    status = gpu.main(["--dry-run", "--results", str(tmp_path / "results"), "--commit", "abc"])
    printed = capsys.readouterr().out
    assert status == 0, printed[-6000:]
    (file,) = (tmp_path / "out").glob("gpu-*.json")
    assert file.read_bytes() == (tmp_path / "results" / file.name).read_bytes()
    assert "=== benchmark decode" in (tmp_path / "out" / "gpu.log").read_text()
    result = json.loads(file.read_text())
    assert result["dry_run"] is True
    assert result["machine"]["commit"] == "abc"
    assert {step["status"] for step in result["steps"]} == {"passed"}
    names = (*gpu.BENCHMARKS, *gpu.ASKED_FOR)
    assert set(names) <= set(result)
    assert [figures(result[name]) for name in names] == [[]] * len(names)
    assert not any(result[name]["errors"] for name in names)
    assert {line["way"] for line in result["linear"]["products"]} == {"fused", "decoded"}
    assert all(step["weights_share"]["fused"]["fused"] > 0 for step in result["model"]["decode"])


MEASURED = (
    "us", "microseconds", "gb_per_s", "copy_gb_per_s", "of_copy", "step_ms", "ms", "peak_beyond_weights", "ratio",
    "bound_us", "of_bound", "ratio_at_bound",
)  # fmt: skip


def figures(value: Any, name: str = "") -> list[Any]:
    """All that looks like a measurement: a dry run has none."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in figures(inner, name if name in MEASURED else key)]
    if isinstance(value, list):
        return [found for inner in value for found in figures(inner, name)]
    measured = name in MEASURED or name.endswith("_seconds") or name == "peak_bytes"
    return [(name, value)] if measured and value is not None else []


def test_what_fails_is_noted_and_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_common = pytest.importorskip("benchmarks.gpu_common", reason="needs torch")
    report = gpu_common.Report(tmp_path / "result.json")
    report.put(first=1)
    assert report.attempt("division", lambda: 1 // 0) is None
    assert report.attempt("sum", lambda: 1 + 1) == 2
    report.put(last=2)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "errors": {"division": "ZeroDivisionError: integer division or modulo by zero"},
        "first": 1,
        "last": 2,
    }
    assert report.end() == 1
    assert "FAILED division" in capsys.readouterr().out


def test_the_gate_names_the_first_difference() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.gpu_common import same_bits

    zeros = torch.zeros(2, 3, dtype=torch.bfloat16)
    same_bits(zeros.clone(), zeros, "zeros")
    nan = torch.full((2, 3), float("nan"), dtype=torch.bfloat16)
    same_bits(nan.clone(), nan, "nan")
    other = zeros.clone()
    other[1, 0] = -0.0
    with pytest.raises(AssertionError, match="minus: 1 elements differ, the first at 3"):
        same_bits(other, zeros, "minus")
    with pytest.raises(AssertionError, match="shapes: expected"):
        same_bits(zeros, zeros[:1], "shapes")
