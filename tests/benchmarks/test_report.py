"""The README's GPU tables: the newest result, or one line that says that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report


def result(date: str, device: str, step_ms: float) -> dict[str, Any]:
    """What ``make gpu`` writes, with made-up figures."""
    both = {"bf16": 4.0, "exact": step_ms, "fused": 3.0}
    return {
        "date": date,
        "dry_run": False,
        "machine": {"versions": {"torch": "2.11.0"}, "python": "3.12", "commit": "abc", "date": date},
        "device": {"name": device, "driver_cuda": "13.0", "nvrtc": "13.0"},
        "decode": {
            "rows": [
                {"what": "tiles to BF16", "shape": [8, 8], "gb_per_s": 1.0, "of_copy": 0.1},
                {"what": "tiles to BF16", "shape": [4096, 14336], "gb_per_s": 1234.4, "of_copy": 0.834},
                {"what": "planes to BF16", "shape": [8, 8], "gb_per_s": None, "of_copy": None},
            ]
        },
        "load": {"load_seconds": {"bf16": 2.0, "exact": 3.0}},
        "linear": {
            "copy_gb_per_s": 3000.0,
            "products": [
                product("A", "q+k+v", (4, 2, 2), 1, 1.25),
                product("A", "q+k+v", (4, 2, 2), 128, 0.5),
                product("A", "LM head", (8,), 1, None),
                product("B", "q", (8,), 1, 1.0),
            ],
        },
        "model": {
            "layers": 16,
            "memory": {n: {"weight_bytes": 8e9, "peak_beyond_weights": None} for n in both},
            "prefill": {"tokens": 2048, "ms": both},
            "decode": [
                {"batch": 1, "step_ms": both, "weights_share": {"exact": {"fused_exact": 0.75, "decoded": 0.25}}}
            ],
        },
    }


def product(model: str, kind: str, rows: tuple[int, ...], tokens: int, ratio: float | None) -> dict[str, Any]:
    return {
        "model": model,
        "kind": kind,
        "rows": rows,
        "cols": 64,
        "tokens": tokens,
        "ratio": ratio,
        "of_bound": None if model == "B" else 0.876,
    }


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in lines}


def test_without_a_result_nothing_is_measured(results: Path) -> None:
    assert "**not measured**" in report.render("gpu")
    assert cells(report.render("gpu")) == {}


def test_a_dry_run_is_no_result(results: Path) -> None:
    (results / "gpu-emulated-2027-01-01.json").write_text(json.dumps({**result("2027-01-01", "x", 1), "dry_run": True}))
    assert report.newest_gpu() == {}


def test_the_newest_result_is_shown_and_gaps_stay_gaps(results: Path) -> None:
    for date, device, step_ms in (("2026-01-01", "A", 6.0), ("2026-02-01", "B", 5.0)):
        (results / f"gpu-{device}-{date}.json").write_text(json.dumps(result(date, device, step_ms)))
    text = report.render("gpu")
    found = cells(text)
    assert "Llama of 16 layers" in text
    assert "at batch 1 75 % straight from compressed weights in cuBLAS's order, 25 % decoded first." in text
    assert found["a token, batch 1"] == ["4.00 ms", "5.00 ms", "1.25x", "3.00 ms", "0.75x"]
    assert found["a token, batch 8"] == ["not measured"] * 5
    assert found["weights"] == ["8.00 GB", "8.00 GB", "1.00x", "8.00 GB", "1.00x"]
    assert found["memory beyond the weights"] == ["not measured"] * 5
    assert found["loading"] == ["2.00 s", "3.00 s", "1.50x", "3.00 s", "1.50x"]
    assert found["tiles to BF16"] == ["4096 x 14336", "1234", "83 %"]
    assert found["planes to BF16"] == ["not measured"] * 3
    assert "benchmarks/results/gpu-B-2026-02-01.json" in text


def test_fused_products(results: Path) -> None:
    (results / "gpu-A.json").write_text(json.dumps(result("2026-01-01", "A", 6.0)))
    text = report.render("gpu")
    lines = [line for line in text.splitlines() if line.startswith(("| A ", "| B ", "| model "))]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["model", "linear", "shape", "1", "128"],
        ["A", "q+k+v", "4 + 2 + 2 x 64", "1.25x (88 %)", "0.50x (88 %)"],
        ["B", "q", "8 x 64", "1.00x", "not measured"],
    ]
    assert "a copy (3000 GB/s)" in text
    assert f"]({report.GPU_PICTURE})" in text


def test_a_picture_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "new" / name for name in ("a.svg", "b.svg")]
    for path in paths:
        assert plots.save(result("2026-01-01", "A", 6.0)["linear"], path)
    drawn = paths[0].read_text()
    assert drawn == paths[1].read_text()
    for text in ("q+k+v", "decoded", "tokens", ">A<"):
        assert text in drawn
    for text in ("LM head", ">B<"):  # without a figure; a single matrix of a group
        assert text not in drawn


def test_no_picture_without_a_measurement(tmp_path: Path) -> None:
    assert not plots.save({}, tmp_path / "a.svg")
    assert not plots.save({"products": [product("A", "o", (8,), 1, None)]}, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
