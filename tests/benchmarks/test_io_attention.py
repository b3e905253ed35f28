"""The benchmark of the I/O model: its figures, at small sizes."""

from __future__ import annotations

import math

import pytest

from benchmarks import io_attention as bench
from bitforbit import cpu
from bitforbit.iomodel import ALGORITHMS, count


def test_rank_correlation() -> None:
    assert bench.rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert bench.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert bench.rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert bench.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert math.isnan(bench.rank_correlation([1, 1], [1, 2]))


def test_counters() -> None:
    assert bench.parse_perf("12345,,L1-dcache-load-misses,1000,100.00,,\n") == 12345
    assert bench.parse_perf("<not supported>,,L1-dcache-load-misses,0,100.00,,\n") is None
    assert bench.parse_perf("perf: not permitted\n") is None


def test_words_are_the_models() -> None:
    assert bench.words("flash", 256, 64, 16) == 2 * 256 * 64 * (1 + 256 // 16)
    n, d, rows = 256, 128, 64
    improved = count("square_improved", n, d, 68 * 68 - 4).moved
    assert ALGORITHMS["square_improved"].choose_tiles(n, d, 68 * 68 - 4).rows == 66  # nearly the kernel's 64
    assert bench.words("square", n, d, rows) - n * n == pytest.approx(improved, rel=0.2)


def test_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "misses", lambda *_: None)
    results = bench.measure_attention(cpu.active(), ((70, 16), (30, 72)), 1)
    assert {r["order"] for r in results} == {"flash", "square"}
    assert all(r["seconds"] > 0 for r in results)
    assert any(r["picked"] for r in results)


def test_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BYTES_AT_LEAST", 1 << 16)
    results = bench.measure_bytes(((64, 128),), (100,))
    assert [r["bytes"] for r in results[::2]] == [2 * 64 * 128, 2 * 100 * 128]
    assert all(r["seconds"] > 0 for r in results)
